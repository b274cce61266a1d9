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

__all__ = ["Outputs", "output_options", "write_json_file"]

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the user asked for of a command's result."""

    as_json: bool
    output: Path | None
    plot: Path | None
    force: bool

    def check(self, *others: Path | None, resume: bool = False) -> None:
        """Raise `ConfigError` for a file that cannot be written, before anything is measured.

        Args:
            others: more files that the command writes
            resume: whether what is in them is gone on with
        """
        named = [path for path in (self.output, self.plot, *others) if path is not None]
        for path in named:
            if [other.absolute() for other in named].count(path.absolute()) > 1:
                raise ConfigError(f"{path} is named twice: give each file a name of its own")
            if path.is_dir() or not path.absolute().parent.is_dir():
                raise ConfigError(f"{path} cannot be written: give a file name in a folder that exists")
            if path.exists() and not self.force and not resume:
                raise ConfigError(f"{path} exists: give another name, or --force to replace it")
        if self.plot is not None:
            if self.plot.suffix not in PLOT_SUFFIXES:
                raise ConfigError(f"{self.plot} has no known kind: end its name with {', '.join(PLOT_SUFFIXES)}")
            if find_spec("matplotlib") is None:
                raise ConfigError("charts need matplotlib: pip install 'cascade-llm[plot]'")

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


def write_json_file(path: Path, value: Any) -> None:
    """Whole or not at all: an interruption while it is written leaves what was there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
