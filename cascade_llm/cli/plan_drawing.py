"""A tree of shared prefixes, drawn: as text, and as a chart."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from cascade_llm.bench.plan_tree import PrefixNode, PrefixTree
from cascade_llm.cli.charts import Span, Spans
from cascade_llm.cli.console import format_bytes

__all__ = ["draw_tree", "tree_chart"]

MAX_LISTED_PROMPTS = 8
FOLDED, OWN = "folded", "own tokens"
"""What is not a level."""


def draw_tree(tree: PrefixTree) -> RenderableType:
    """The tree, and below it what one decode step over all prompts reads and saves."""
    num_prompts = len(tree.prompt_lens)
    drawn = Tree(Text(_count(num_prompts, "prompt"), style="bold"))
    _add_children(drawn, tree.root, tree)
    return Group(drawn, Text(), *map(Text, _report_lines(tree)))


def tree_chart(tree: PrefixTree) -> Spans:
    """Each run from its first to its last token, as high as it has sequences, beside the run that it goes on from."""
    levels = sorted({node.level for node in tree.root.walk() if node.level is not None})
    saved = format_bytes(tree.report.kv_tokens_saved * tree.kv_bytes_per_token)
    share = tree.report.kv_tokens_saved / tree.report.kv_tokens_one_level
    return Spans(
        title=f"{_count(len(tree.prompt_lens), 'prompt')}: a decode step saves {saved} of K/V ({share:.0%})\n"
        f"predicted attention {_format_s(tree.attention_s)}, with one level {_format_s(tree.attention_one_level_s)}",
        x_label="tokens from the start of the prompt",
        y_label="sequences",
        spans=list(_spans(tree.root, tree, 0)),
        series=[f"level {level}" for level in levels],
        pale_series=(FOLDED, OWN),
    )


def _spans(node: PrefixNode, tree: PrefixTree, top: int) -> Iterator[Span]:
    """Of a node and all below it, whose sequences begin at `top`."""
    if node.num_tokens:
        series = FOLDED if node.level is None else f"level {node.level}"
        label = f"{node.num_tokens:,} tokens\n{node.num_sequences:,} sequences"
        yield Span(node.start_len, node.end_len, top, node.num_sequences, series, label)
    for child in _ordered_children(node):
        yield from _spans(child, tree, top)
        top += child.num_sequences
    ends = sorted((tree.prompt_lens[prompt] for prompt in node.prompts), reverse=True)
    for end, same in groupby(ends):
        count = len(list(same))
        own = f"{end - node.end_len:,} own" + (f"\n{count:,} sequences" if count > 1 else "")
        yield Span(node.end_len, end, top, count, OWN, own)
        top += count


def _ordered_children(node: PrefixNode) -> list[PrefixNode]:
    return sorted(node.children, key=lambda child: -child.kv_tokens_saved)


def _add_children(branch: Tree, node: PrefixNode, tree: PrefixTree) -> None:
    for child in _ordered_children(node):
        _add_children(branch.add(_label(child, tree)), child, tree)
    if node.prompts:
        branch.add(_prompts_label(node, tree))


def _label(node: PrefixNode, tree: PrefixTree) -> Text:
    label = Text()
    label.append(f"{node.num_tokens:,} tokens", style="bold")
    label.append(f" in {node.num_sequences} sequences  ")
    if node.level is None:
        label.append("folded into what is below", style="dim")
    else:
        saved = format_bytes(node.kv_tokens_saved * tree.kv_bytes_per_token)
        label.append(f"level {node.level}", style="green")
        label.append(f", saves {saved} a step")
    if node.text:
        label.append(f"\n“{node.text}…”", style="italic dim")
    return label


def _prompts_label(node: PrefixNode, tree: PrefixTree) -> Text:
    own_lens = [tree.prompt_lens[prompt] - node.end_len for prompt in node.prompts]
    low, high = min(own_lens), max(own_lens)
    listed = ", ".join(map(str, node.prompts[:MAX_LISTED_PROMPTS]))
    more = ", …" if len(node.prompts) > MAX_LISTED_PROMPTS else ""
    span = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    each = "" if len(node.prompts) == 1 else " each"
    return Text(f"{_count(len(node.prompts), 'prompt')} ({listed}{more}), {span} own tokens{each}", style="dim")


def _report_lines(tree: PrefixTree) -> list[str]:
    report, unit = tree.report, tree.kv_bytes_per_token
    read, whole = report.kv_tokens_read * unit, report.kv_tokens_one_level * unit
    lines = [f"One decode step reads {format_bytes(read)} of K/V; one level would read {format_bytes(whole)}."]
    if report.reason is None:
        lines.append(
            f"{report.num_levels} levels (the suffixes counted), {_count(report.num_groups, 'shared segment')}: "
            f"{report.kv_tokens_saved / report.kv_tokens_one_level:.0%} saved."
        )
    else:
        lines.append(f"Nothing is shared: {report.reason}.")
    lines.append(
        f"Predicted attention of that step, all layers: {_format_s(tree.attention_s)}; "
        f"with one level {_format_s(tree.attention_one_level_s)}."
    )
    return [*lines, f"Cost model: {tree.costs}."]


def _format_s(seconds: float) -> str:
    """Three digits: 1.23 ms."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
