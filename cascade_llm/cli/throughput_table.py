"""Runs with cascade attention on and off: a bar while they are made, a table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cascade_llm.bench.throughput import RUNS, Reading, speed
from cascade_llm.cli.console import error_console, format_bytes

__all__ = ["ratio_lines", "run_bar", "throughput_table"]


MEANINGS = {"cold": "prefill and decode", "warm": "prompts cached, so nearly all decode"}

Readings = Mapping[str, Mapping[str, Sequence[Reading]]]
"""By engine ("on", "off"), then by run."""


def throughput_table(readings: Readings) -> Table:
    """One row per engine and run: tokens per second, and the counters of its first reading."""
    table = Table()
    table.add_column("cascade")
    table.add_column("run")
    for heading in ("tok/s", "lowest to highest", "KV read", "KV saved", "prefilled", "cached", "generated"):
        table.add_column(heading, justify="right")
    for engine, runs in readings.items():
        for run, of_run in runs.items():
            spread, counters = speed(of_run), of_run[0].counters
            table.add_row(
                engine,
                run,
                f"{spread.median:.1f}",
                f"{spread.low:.1f} to {spread.high:.1f}",
                format_bytes(counters["kv_bytes_read"]),
                format_bytes(counters["kv_bytes_saved"]),
                f"{counters['prefilled_tokens']:,}",
                f"{counters['cached_tokens']:,}",
                f"{counters['generated_tokens']:,}",
            )
    return table


def ratio_lines(readings: Readings) -> list[str]:
    """On against off, per run."""
    return [
        f"{run} ({MEANINGS[run]}): on is {speed(readings['on'][run]).median / speed(readings['off'][run]).median:.2f} "
        "times as fast as off"
        for run in RUNS
    ]


@contextmanager
def run_bar(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with a name before each run."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = error_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=total)
        started: list[str] = []

        def on_run(name: str) -> None:
            bar.update(task, description=name, completed=len(started))
            started.append(name)

        yield on_run
