"""Files that a command writes: refused before the work where they are there already, or cannot be written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import click

from cascade_llm.errors import ConfigError

__all__ = ["check_output_files", "check_settings", "output_options", "write_json_file"]

Command = TypeVar("Command", bound=Callable[..., Any])

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def output_options(command: Command) -> Command:
    """`--json`, `--output`, `--plot` and `--force`."""
    for option in reversed(
        (
            click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables."),
            click.option("--output", type=click.Path(path_type=Path), help="Write the JSON to this file as well."),
            click.option("--plot", type=click.Path(path_type=Path), help="Draw a chart: a .png, .svg or .pdf file."),
            click.option("--force", is_flag=True, help="Replace files that exist."),
        )
    ):
        command = option(command)
    return command


def check_output_files(output: Path | None, plot: Path | None, *others: Path | None, force: bool) -> None:
    """Raise `ConfigError` for a file that cannot be written, before anything is measured."""
    named = [path for path in (output, plot, *others) if path is not None]
    for path in named:
        if [other.absolute() for other in named].count(path.absolute()) > 1:
            raise ConfigError(f"{path} is named twice: give each file a name of its own")
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ConfigError(f"{path} cannot be written: give a file name in a folder that exists")
        if path.exists() and not force:
            raise ConfigError(f"{path} exists: give another name, or --force to replace it")
    if plot is not None:
        if plot.suffix not in PLOT_SUFFIXES:
            raise ConfigError(f"{plot} has no known kind: end its name with {', '.join(PLOT_SUFFIXES)}")
        if find_spec("matplotlib") is None:
            raise ConfigError("charts need matplotlib: pip install 'cascade-llm[plot]'")


def check_settings(path: Path, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where a file that is to be gone on with was measured with other settings."""
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise ConfigError(f"{path} was measured with another {', '.join(changed)}: give the same, or another --output")


def write_json_file(path: Path, value: Any) -> None:
    """Whole or not at all: an interruption while it is written leaves what was there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
