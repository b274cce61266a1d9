"""Where a command's result goes: a table or JSON, and files, refused before the work where they cannot be written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.console import print_json
from cascade_llm.cli.field_options import stacked
from cascade_llm.errors import ConfigError

if TYPE_CHECKING:
    from cascade_llm.cli.charts import Chart

__all__ = ["Outputs", "check_output_files", "check_settings", "output_options", "write_json_file"]

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the user asked for of a command's result."""

    as_json: bool
    output: Path | None
    plot: Path | None
    force: bool

    def check(self, *others: Path | None, resume: bool = False) -> None:
        """See `check_output_files`; a file that is gone on with may exist."""
        check_output_files(self.output, self.plot, *others, force=self.force or resume)

    def deliver(
        self,
        record: Mapping[str, Any],
        show: Callable[[], None],
        charts: Callable[[], Sequence[Chart]],
        *,
        caption: str = "",
        columns: int = 3,
    ) -> None:
        """Write and draw the files, then print the record as JSON or `show` it."""
        if self.output is not None:
            write_json_file(self.output, record)
        if self.plot is not None and (drawn := charts()):
            from cascade_llm.cli.charts import draw_charts

            draw_charts(self.plot, drawn, caption=caption, columns=columns)
        if self.as_json:
            print_json(record, indent=2)
        else:
            show()


def output_options(command: Callable[..., None]) -> Callable[..., None]:
    """`--json`, `--output`, `--plot` and `--force`, which the command gets as `out`, an `Outputs`."""

    @wraps(command)
    def call(*, as_json: bool, output: Path | None, plot: Path | None, force: bool, **arguments: Any) -> None:
        command(out=Outputs(as_json=as_json, output=output, plot=plot, force=force), **arguments)

    return stacked(
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables."),
        click.option("--output", type=click.Path(path_type=Path), help="Write the JSON to this file as well."),
        click.option("--plot", type=click.Path(path_type=Path), help="Draw a chart: a .png, .svg or .pdf file."),
        click.option("--force", is_flag=True, help="Replace files that exist."),
    )(call)


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
