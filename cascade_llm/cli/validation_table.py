"""What validation found, as a table and a verdict."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from cascade_llm.cli.console import error_console

if TYPE_CHECKING:
    from cascade_llm.validation.report import Progress as TellProgress
    from cascade_llm.validation.report import ValidationReport

__all__ = ["notes", "validation_bar", "validation_table", "verdict"]

STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def validation_table(report: ValidationReport) -> Table:
    """One row per check, sections one below the other."""
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


def notes(report: ValidationReport) -> list[str]:
    """What is to be said about single checks."""
    return [f"{check.name}: {check.note}" for section in report.sections for check in section.checks if check.note]


def verdict(report: ValidationReport) -> Text:
    """The last line: how many checks, and whether all of them hold."""
    checks = [check for section in report.sections for check in section.checks]
    counts = ", ".join(
        f"{count} {name}" for name in STYLES if (count := sum(check.verdict == name for check in checks))
    )
    word = "passed" if report.passed else "failed"
    return Text(f"Validation {word}: {counts or 'nothing was checked'}.", style=STYLES[word])


@contextmanager
def validation_bar() -> Iterator[TellProgress]:
    """Yields a function to tell how far it is; draws on a terminal only."""
    console = error_console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("reading the model", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield progress
