"""A tree of shared prefixes, drawn."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from cascade_llm.bench.plan_tree import PrefixNode, PrefixTree
from cascade_llm.cli.console import format_bytes

__all__ = ["draw_tree"]

MAX_LISTED_PROMPTS = 8


def draw_tree(tree: PrefixTree) -> RenderableType:
    """The tree, and below it what one decode step over all prompts reads and saves."""
    num_prompts = len(tree.prompt_lens)
    drawn = Tree(Text(_count(num_prompts, "prompt"), style="bold"))
    _add_children(drawn, tree.root, tree)
    return Group(drawn, Text(), *map(Text, _report_lines(tree)))


def _add_children(branch: Tree, node: PrefixNode, tree: PrefixTree) -> None:
    for child in sorted(node.children, key=lambda child: -child.kv_tokens_saved):
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
            f"{report.kv_tokens_saved / report.kv_tokens_one_level:.0%} saved. Cost model: {tree.costs}."
        )
    else:
        lines.append(f"Nothing is shared: {report.reason}. Cost model: {tree.costs}.")
    return lines


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
