"""`python -m benchmarks perplexity`: one text by files of several types of weights, ours and llama.cpp's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.console import error_console, format_bytes, result_console
from cascade_llm.cli.field_options import SectionedCommand, engine_options, stacked, take_engine
from cascade_llm.cli.output_files import Outputs, output_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from benchmarks.perplexity import ModelScores

__all__ = ["perplexity"]

text_options = stacked(
    click.option("--text", type=click.Path(path_type=Path), help="A file; default: the language reference in pydoc."),
    click.option("--num-tokens", type=click.IntRange(min=2), default=20480, show_default=True, help="Tokens of it."),
    click.option(
        "--window-len", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens read at once."
    ),
)


@click.command(cls=SectionedCommand)
@click.option("-m", "--model", "models", multiple=True, default=("smollm2",), help="As elsewhere; may be repeated.")
@click.option("--against", type=click.Choice(["llama.cpp"]), help="Score files of GGUF by this engine too.")
@click.option("--peer-python", type=click.Path(path_type=Path), help="The interpreter that has it.")
@click.option("--exact/--no-exact", default=True, help="Score with exact inputs of products too.")
@click.option("--twin/--no-twin", default=True, help="Score the dequantized float32 weights too.")
@text_options
@output_options
@engine_options(without=("exact_activations", "quantization"))
def perplexity(
    *,
    out: Outputs,
    models: tuple[str, ...],
    against: str | None,
    peer_python: Path | None,
    exact: bool,
    twin: bool,
    text: Path | None,
    num_tokens: int,
    window_len: int,
    **arguments: Any,
) -> None:
    """How well models foretell a text, with inputs of products rounded to 8 bits and exact, and beside their twins.

    Tokens are those of the first model's tokenizer. Every window is read by itself; its first token is not scored.
    """
    options = take_engine(arguments)
    out.check()
    from benchmarks.peer_environment import find_peer
    from benchmarks.perplexity import read_text, score_model, windows_of
    from cascade_llm.bench.machine import describe_machine
    from cascade_llm.bench.setup import open_model

    opened = [open_model(model, options) for model in models]
    peer = None if against is None else find_peer(against, peer_python)
    source = read_text(text)
    windows = windows_of(opened[0], source, num_tokens=num_tokens, window_len=window_len)
    results = []
    for model in opened:
        is_file = (found := model.checkpoint.tokenizer_source) is not None and found.is_file()
        other = peer if is_file else None
        results.append(score_model(model, windows, with_exact=exact, with_twin=twin, peer=other))
        error_console().print(_result_line(results[-1]), style="dim")
    record = {
        "text": {"name": source.name, "sha256": source.digest, "windows": len(windows), "window_len": window_len},
        "machine": describe_machine(),
        "settings": {"options": options},
        "results": [result.as_dict() for result in results],
    }

    def show() -> None:
        result_console().print(_table(results))
        result_console().print(
            f"{source.name} (sha256 {source.digest}), {len(windows)} windows of {window_len} tokens; in brackets the "
            "mean difference to the float32 twin, nats a token",
            style="dim",
        )

    out.deliver(record, show, list)


def _result_line(result: ModelScores) -> str:
    scores = ", ".join(f"{side} {result.perplexity(side):.4f}" for side in result.logprobs)
    return f"{Path(result.model).name}: {scores}"


def _table(results: Sequence[ModelScores]) -> Table:
    from rich.table import Table

    sides = list(dict.fromkeys(side for result in results for side in result.logprobs))
    table = Table("model", "size", "types", *sides)
    for result in results:
        types = ", ".join(sorted(result.types, key=lambda name: -result.types[name]))
        table.add_row(
            Path(result.model).name, format_bytes(result.num_bytes), types, *(_cell(result, s) for s in sides)
        )
    return table


def _cell(result: ModelScores, side: str) -> str:
    if side not in result.logprobs:
        return ""
    difference = result.mean_difference(side)
    return f"{result.perplexity(side):.4f}" + ("" if difference is None else f" ({difference:.4f})")
