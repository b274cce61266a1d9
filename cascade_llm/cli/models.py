"""`cascade-llm models`: what the hubs' caches hold, and whether it can be served here."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import click
from rich.table import Table

from cascade_llm.cli.console import error_console, format_bytes, print_json, result_console

if TYPE_CHECKING:
    from cascade_llm.engine.cached_models import CachedReport

__all__ = ["models"]

SHORT_REVISION = 8


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(as_json: bool) -> None:
    """List the models in the caches of Hugging Face and ModelScope: size, use, support, estimated memory.

    Memory is that of the weights, and what the KV pool may come to with default options as it is used. Only headers are
    read.
    """
    from cascade_llm.engine.cached_models import describe_cache
    from cascade_llm.loader.hubs import open_hubs

    hubs = open_hubs()
    with error_console().status("reading headers"):
        reports = list(describe_cache(hubs))
    if as_json:
        print_json([asdict(report) for report in reports], indent=2)
    elif reports:
        result_console().print(_table(reports))
        for report in reports:
            if report.reason is not None:
                click.echo(f"{report.model}: {report.reason}")
    else:
        folders = " and ".join(str(hub.cache_folder) for hub in hubs)
        click.echo(f"no models in {folders}: cascade-llm pull ORG/NAME fetches one")


def _table(reports: list[CachedReport]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for name in ("revision", "format", "architecture", "served"):
        table.add_column(name)
    for name in ("on disk", "weights", "pool up to"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("used", no_wrap=True)
    for report in reports:
        table.add_row(
            report.model,
            report.revision[:SHORT_REVISION],
            f"{report.format}, {report.quantization}" if report.quantization else report.format,
            report.architecture or "unknown",
            "yes" if report.reason is None else "no",
            format_bytes(report.num_bytes),
            _size(report.weights_bytes),
            _size(report.pool_bytes),
            datetime.fromtimestamp(report.last_used).strftime("%Y-%m-%d"),
        )
    return table


def _size(num_bytes: int | None) -> str:
    return "" if num_bytes is None else format_bytes(num_bytes)
