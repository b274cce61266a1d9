"""`cascade-llm batch`: a file of requests in OpenAI's batch format, answered without a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.console import error_console, format_bytes, open_llm
from cascade_llm.cli.extras import require_serve_extra
from cascade_llm.cli.field_options import SectionedCommand, engine_options, model_option, take_engine
from cascade_llm.errors import ConfigError, GenerationError

if TYPE_CHECKING:
    from cascade_llm.server.batch import BatchCounts

__all__ = ["batch"]


@click.command(cls=SectionedCommand)
@click.argument("requests", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("answers", type=click.Path(dir_okay=False, path_type=Path))
@model_option
@click.option(
    "--served-model-name",
    "names",
    multiple=True,
    help="Name of the model in requests and answers; may be given again. Default: the model's own, and --model.",
)
@click.option("--strict", is_flag=True, help="Refuse unknown fields of a request instead of ignoring them.")
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=4096,
    show_default=True,
    help="Lines that are read ahead and ordered by their beginnings.",
)
@click.option("--in-order", is_flag=True, help="Keep the file's order, to see what the other one saves.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bar and no summary.")
@engine_options()
def batch(
    requests: Path,
    answers: Path,
    model: str,
    names: tuple[str, ...],
    strict: bool,
    window: int,
    in_order: bool,
    quiet: bool,
    **arguments: Any,
) -> None:
    """Answer REQUESTS, a file in OpenAI's batch format, into ANSWERS; those that begin alike run together.

    Lines that ANSWERS holds are not run again: a run that was ended is gone on with by the same command.
    """
    options = take_engine(arguments)
    require_serve_extra("batch")
    if answers.exists() and answers.samefile(requests):
        raise ConfigError(f"{answers} has the requests: give another name for the answers")
    from cascade_llm.server.batch import run_batch
    from cascade_llm.server.batch_output import BatchOutput

    with BatchOutput(answers) as output, open_llm(model, options) as llm:
        start_s, before = time.perf_counter(), output.num_records
        try:
            with _bar(requests, enabled=not quiet) as on_line:
                counts = run_batch(
                    llm,
                    requests,
                    output,
                    names=names or tuple(dict.fromkeys((llm.model_name, model))),
                    strict=strict,
                    window=window,
                    in_order=in_order,
                    on_line=on_line,
                )
        except KeyboardInterrupt:
            kept = f"{answers} has {output.num_records} answers, {output.num_records - before} of them new"
            error_console().print(f"{kept}: the same command goes on from there", soft_wrap=True)
            raise
        if not quiet:
            error_console().print(
                _summary(counts, llm.stats(), time.perf_counter() - start_s), style="dim", soft_wrap=True
            )
    if counts.failed:
        total = counts.answered + counts.failed
        raise GenerationError(f"{counts.failed} of {total} lines have an error: see theirs in {answers}")


@contextmanager
def _bar(requests: Path, *, enabled: bool) -> Iterator[Callable[[BatchCounts], None]]:
    console = error_console()
    if not (enabled and console.is_terminal):
        yield lambda counts: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from cascade_llm.server.batch_lines import numbered_lines

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    failed = TextColumn("{task.fields[failed]} errors")
    with Progress(*columns, failed, console=console, transient=True) as bar:
        task = bar.add_task("lines", total=sum(1 for _ in numbered_lines(requests)), failed=0)

        def on_line(counts: BatchCounts) -> None:
            bar.update(task, completed=counts.answered + counts.failed + counts.found_done, failed=counts.failed)

        yield on_line


def _summary(counts: BatchCounts, stats: dict[str, int], elapsed_s: float) -> str:
    read, saved = stats["kv_bytes_read"], stats["kv_bytes_saved"]
    share = f" ({saved / (read + saved):.0%})" if saved else ""
    done = f", {counts.found_done} were done before" if counts.found_done else ""
    return (
        f"{counts.answered} answered, {counts.failed} with errors{done}; {stats['generated_tokens']} tokens "
        f"in {elapsed_s:.2f} s\n"
        f"prompt tokens: {stats['prompt_tokens']}, of which {stats['cached_tokens']} cached; "
        f"KV read {format_bytes(read)}, saved by sharing {format_bytes(saved)}{share}"
    )
