"""`cascade-llm validate`: is what it computes right, on this machine and with this model?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cascade_llm.cli.console import error_console, print_json, result_console
from cascade_llm.cli.field_options import SectionedCommand, engine_options, take_engine
from cascade_llm.validation.options import OPTIONS

if TYPE_CHECKING:
    from rich.console import Console

    from cascade_llm.validation.report import Progress as TellProgress
    from cascade_llm.validation.report import ValidationReport

__all__ = ["validate"]

LINE_EVERY_S = 5.0
"""Between two lines that say what is done, where there is no terminal."""
STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


@click.command(cls=SectionedCommand)
@click.argument("model", required=False)
@click.option("--quick", is_flag=True, help="Fewer plans and shorter texts: under a minute with a small model.")
@click.option("--replay", type=click.Path(path_type=Path), help="Run the steps of a record_plans file again instead.")
@click.option("--max-steps", type=click.IntRange(min=1), help="With --replay: end after so many steps.")
@click.option("--allow-truncated", is_flag=True, help="With --replay: use what is there of a file that breaks off.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--seed", default=0, show_default=True, help="Of the generated plans and of random K and V.")
@engine_options(only=OPTIONS)
def validate(
    model: str | None,
    quick: bool,
    replay: Path | None,
    max_steps: int | None,
    allow_truncated: bool,
    as_json: bool,
    seed: int,
    **arguments: Any,
) -> None:
    """Compare attention, engine and MODEL with their references, and print figures and a verdict.

    Every attention backend that can run here is compared with float64 attention over generated plans; the engine with
    cascade attention on with itself without it, and with a warm cache; MODEL with transformers.

    With --replay the steps of a recording are run again: attention on random K and V, and where MODEL is given and
    token ids were recorded the engine, whose tokens are compared. Exit status 1 where anything differs by too much.
    """
    options = take_engine(arguments)
    if model is None and replay is None:
        raise click.UsageError("give a MODEL (a folder, a .gguf file, a hub id, or smollm2), or a file to --replay.")
    if replay is None and (max_steps is not None or allow_truncated):
        raise click.UsageError("--max-steps and --allow-truncated are for --replay.")
    with _bar() as progress:
        if replay is not None:
            from cascade_llm.validation.replay_file import replay as run_replay

            report = run_replay(
                replay,
                model,
                options,
                max_steps=max_steps,
                allow_truncated=allow_truncated,
                seed=seed,
                progress=progress,
            )
        else:
            from cascade_llm.validation.validate import FULL, QUICK
            from cascade_llm.validation.validate import validate as run_validation

            assert model is not None
            report = run_validation(model, options, effort=QUICK if quick else FULL, seed=seed, progress=progress)
    if as_json:
        print_json(report.as_dict(), indent=2)
    else:
        console = result_console()
        console.print(_table(report))
        for note in _notes(report):
            console.print(f"- {note}", style="dim")
        console.print(_verdict(report))
    if not report.passed:
        click.get_current_context().exit(1)


def _table(report: ValidationReport) -> Table:
    table = Table(show_lines=False)
    for heading in ("check", "found", "allowed", "verdict"):
        table.add_column(heading, overflow="fold")
    for section in report.sections:
        table.add_row(Text(section.title, style="bold"), Text(f"{section.seconds:.1f} s", style="dim"), "", "")
        for check in section.checks:
            table.add_row(
                f"  {check.name}", check.found, check.allowed, Text(check.verdict, style=STYLES[check.verdict])
            )
        table.add_section()
    return table


def _notes(report: ValidationReport) -> list[str]:
    return [f"{check.name}: {check.note}" for section in report.sections for check in section.checks if check.note]


def _verdict(report: ValidationReport) -> Text:
    checks = [check for section in report.sections for check in section.checks]
    counts = ", ".join(
        f"{count} {name}" for name in STYLES if (count := sum(check.verdict == name for check in checks))
    )
    word = "passed" if report.passed else "failed"
    return Text(f"Validation {word}: {counts or 'nothing was checked'}.", style=STYLES[word])


@contextmanager
def _bar() -> Iterator[TellProgress]:
    """A bar on a terminal; elsewhere a line now and then, so that a log shows that something is done."""
    console = error_console()
    if not console.is_terminal:
        yield _Lines(console).tell
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("reading the model", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield progress


class _Lines:
    """Says what is done, at most every few seconds."""

    def __init__(self, console: Console) -> None:
        self._console, self._start = console, time.monotonic()
        self._last = self._start

    def tell(self, what: str, done: int, total: int) -> None:
        """See `report.Progress`."""
        now = time.monotonic()
        if now - self._last >= LINE_EVERY_S:
            self._last = now
            self._console.print(f"{now - self._start:.0f} s: {what} ({done} of {total})", style="dim")
