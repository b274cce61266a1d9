"""`cascade-llm bench growth`: how speed and planning time grow with sequences and with the shared prefix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.console import print_json, result_console
from cascade_llm.cli.field_options import SectionedCommand, engine_options, model_option, take_engine
from cascade_llm.cli.output_files import check_output_files, output_options, write_json_file
from cascade_llm.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from cascade_llm.bench.throughput import ThroughputReport

__all__ = ["growth"]


@click.command(cls=SectionedCommand)
@model_option
@click.option("--batches", default="1,4,16,64,256", show_default=True, help="Numbers of sequences.")
@click.option("--prefix-lens", default="0,512,1024,2048,4096,7936", show_default=True, help="Shared tokens.")
@click.option("--at-batch", type=int, default=16, show_default=True, help="Sequences while the prefix grows.")
@click.option("--at-prefix", type=int, default=1024, show_default=True, help="Shared tokens while the batch grows.")
@click.option("--suffix-len", type=int, default=32, show_default=True, help="Own prompt tokens of each request.")
@click.option("--output-len", type=int, default=16, show_default=True, help="Generated tokens of each request.")
@click.option("--repeat", type=click.IntRange(min=1), default=2, show_default=True, help="Turns for each point.")
@output_options
@engine_options(without=("enable_cascade_attention",))
def growth(
    model: str,
    batches: str,
    prefix_lens: str,
    at_batch: int,
    at_prefix: int,
    suffix_len: int,
    output_len: int,
    repeat: int,
    as_json: bool,
    output: Path | None,
    plot: Path | None,
    force: bool,
    **arguments: Any,
) -> None:
    """Decode speed with cascade on and off, and planning time, over batch and prefix length."""
    options = take_engine(arguments)
    check_output_files(output, plot, force=force)
    points = [(batch, at_prefix) for batch in _numbers("--batches", batches, 1)]
    points += [(at_batch, length) for length in _numbers("--prefix-lens", prefix_lens, 0)]
    from cascade_llm.bench.compare import compare_each
    from cascade_llm.bench.setup import open_model
    from cascade_llm.bench.throughput import num_runs
    from cascade_llm.bench.workloads import SharedPrefixWorkload
    from cascade_llm.cli.demo_runs import run_bar

    bench = open_model(model, options)
    loads = {
        f"{batch} x {prefix_len}": bench.load(
            SharedPrefixWorkload(
                prefix_len=prefix_len, num_requests=batch, suffix_len=suffix_len, output_len=output_len
            )
        )
        for batch, prefix_len in dict.fromkeys(points)
    }
    reports: dict[str, ThroughputReport] = {}
    with run_bar(sum(num_runs(2, repeat, load, with_off=True) + 2 for load in loads.values())) as on_run:
        try:
            for name, report in compare_each(bench, loads, repeat=repeat, on_run=on_run):
                reports[name] = report
                if output is not None:
                    write_json_file(output, {name: report.as_dict() for name, report in reports.items()})
        except KeyboardInterrupt:
            if not reports:
                raise
    interrupted = len(reports) < len(loads) or any(report.interrupted for report in reports.values())
    if plot is not None:
        _draw(reports, points, at_batch, at_prefix, plot)
    if as_json:
        print_json({name: report.as_dict() for name, report in reports.items()}, indent=2)
    else:
        result_console().print(_table(reports))
    if interrupted:
        raise click.Abort


def _numbers(option: str, text: str, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}: write integers with commas between") from None
    if min(numbers) < least:
        raise ConfigError(f"{option} has {min(numbers)}: numbers must be {least} or larger")
    return numbers


def _quantity(report: ThroughputReport) -> str:
    return "decode" if "decode" in report.quantities() else "warm"


def _planning_ms(report: ThroughputReport) -> float | None:
    parts = report.step_parts_s.get(report.main)
    return None if parts is None else parts["planning"] * 1e3


def _table(reports: dict[str, ThroughputReport]) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("sequences x shared tokens")
    for heading in ("on, tok/s", "off, tok/s", "speed-up", "share of limit", "planning, ms", "step, ms"):
        table.add_column(heading, justify="right")
    for name, report in reports.items():
        quantity = _quantity(report)
        on, off = (report.tokens_per_s(side, quantity).median for side in report.readings)
        share, planning = report.share_of_limit(report.main, quantity), _planning_ms(report)
        step_ms = sum(report.step_parts_s.get(report.main, {}).values()) * 1e3
        table.add_row(
            name,
            f"{on:,.0f}",
            f"{off:,.0f}",
            f"{on / off:.2f}",
            "" if share is None else f"{share:.0%}",
            "" if planning is None else f"{planning:.2f}",
            f"{step_ms:.1f}" if step_ms else "",
        )
    return table


def _draw(
    reports: dict[str, ThroughputReport], points: list[tuple[int, int]], at_batch: int, at_prefix: int, path: Path
) -> None:
    from cascade_llm.cli.charts import Lines, draw_charts

    charts = []
    for axis, fixed, by in (
        ("sequences", f"{at_prefix} shared tokens", 0),
        ("shared tokens", f"{at_batch} sequences", 1),
    ):
        held = at_prefix if by == 0 else at_batch
        chosen = sorted({point for point in points if point[1 - by] == held and f"{point[0]} x {point[1]}" in reports})
        along = [(point[by], reports[f"{point[0]} x {point[1]}"]) for point in chosen]
        if not along:
            continue
        xs = [float(x) for x, _ in along]
        speeds = {
            side: (xs, [report.tokens_per_s(side, _quantity(report)).median for _, report in along])
            for side in along[0][1].readings
        }
        ratio = [report.ratio("cascade off", _quantity(report)).median for _, report in along]
        share = [report.share_of_limit(report.main, _quantity(report)) or 0.0 for _, report in along]
        planning = [_planning_ms(report) or 0.0 for _, report in along]
        is_log = by == 0
        charts += [
            Lines(title=f"decode, {fixed}", x_label=axis, y_label="tok/s", curves=speeds, log_x=is_log),
            Lines(
                title=f"speed-up and share of the limit, {fixed}",
                x_label=axis,
                y_label="",
                curves={"on over off": (xs, ratio), "share of limit": (xs, share)},
                log_x=is_log,
                mark=1.0,
            ),
            Lines(
                title=f"planning, {fixed}",
                x_label=axis,
                y_label="ms a step",
                curves={"on": (xs, planning)},
                log_x=is_log,
            ),
        ]
    draw_charts(path, charts)
