"""Where output goes: results to standard output, everything about them to standard error."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

if TYPE_CHECKING:
    from cascade_llm.llm import LLM

__all__ = ["error_console", "format_bytes", "open_llm", "print_json", "result_console", "run_bar"]

REPORT_WIDTH = 110
"""Columns of tables and trees where the output is no terminal."""


def result_console() -> Console:
    """Standard output; plain where it is no terminal, without colour under NO_COLOR."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = REPORT_WIDTH
    return console


def error_console() -> Console:
    """Standard error, for progress and summaries."""
    return Console(stderr=True, highlight=False, markup=False)


def print_json(value: Any, *, indent: int | None = None) -> None:
    """One JSON value on standard output, never mixed with markup or wrapped; escaped where it takes ASCII only."""
    has_unicode = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name.startswith("utf")
    click.echo(json.dumps(value, ensure_ascii=not has_unicode, indent=indent))


def format_bytes(num_bytes: float) -> str:
    """Three digits and a decimal unit: 1.23 MB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(num_bytes) >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        del units[0]
    return f"{num_bytes:.3g} {units[0]}"


@contextmanager
def open_llm(model: str, options: dict[str, Any]) -> Iterator[LLM]:
    """An engine for the length of a `with` block; says on a terminal how far it is loaded."""
    with error_console().status(f"loading {model}"):
        from cascade_llm.llm import LLM
    with LLM(model, **options) as llm:  # draws bars of its own
        yield llm


@contextmanager
def run_bar(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with a name before each run."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = error_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=total)
        started: list[str] = []

        def on_run(name: str) -> None:
            bar.update(task, description=name, completed=len(started))
            started.append(name)

        yield on_run
