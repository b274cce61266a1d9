"""`cascade-llm bench throughput`: output tokens per second of a workload, and how far from the machine's limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.bench_workloads import WorkloadGroup
from cascade_llm.cli.console import result_console, run_bar
from cascade_llm.cli.field_options import engine_options, model_option, stacked, take_engine
from cascade_llm.cli.output_files import Outputs, output_options

if TYPE_CHECKING:
    from cascade_llm.bench.load import Load
    from cascade_llm.bench.setup import BenchModel
    from cascade_llm.bench.sides import OpenSide
    from cascade_llm.bench.throughput import ThroughputReport
    from cascade_llm.bench.workloads import Workload

__all__ = ["OpenOthers", "load_options", "measure", "off_option", "throughput", "throughput_options"]

OpenOthers = Callable[["BenchModel", "Load"], "list[OpenSide]"]
"""How other engines are opened for a load."""

load_options = stacked(
    click.option("--temperature", type=float, help="0 is greedy; default: the workload's own."),
    click.option("--top-p", type=float, default=1.0, show_default=True, help="Of the sampling."),
    click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Turns."),
)
"""How tokens are drawn, and how often all is run."""

off_option = click.option("--off/--no-off", "with_off", default=True, help="Compare with cascade attention off.")

throughput_options = stacked(
    model_option,
    load_options,
    off_option,
    click.option("--parts/--no-parts", default=True, help="One more run for where a step's time goes."),
    output_options,
    engine_options(without=("enable_cascade_attention",)),
)
"""All options of a workload's command."""


def measure(
    workload: Workload,
    *,
    model: str,
    out: Outputs,
    open_others: OpenOthers = lambda bench, load: [],
    temperature: float | None,
    top_p: float,
    repeat: int,
    with_off: bool,
    parts: bool,
    **arguments: Any,
) -> None:
    """Measure a workload and show the result; `arguments`: the engine's options, as the command line gives them."""
    options = take_engine(arguments)
    out.check()
    from cascade_llm.bench.setup import open_model
    from cascade_llm.bench.throughput import compare, num_runs

    bench = open_model(model, options)
    load = bench.load(workload, temperature=temperature, top_p=top_p)
    others = open_others(bench, load)
    with run_bar(num_runs(1 + with_off + len(others), repeat, load, with_off=with_off)) as on_run:
        report = compare(bench, load, with_off=with_off, others=others, repeat=repeat, split_steps=parts, on_run=on_run)
    from cascade_llm.cli.throughput_report import charts, load_line

    out.deliver(
        report.as_dict(), lambda: _print(report), lambda: charts(report), caption=load_line(report.model, report.load)
    )
    if report.interrupted:
        raise click.Abort


def _print(report: ThroughputReport) -> None:
    from cascade_llm.cli import throughput_report as text

    console, load = result_console(), report.load
    console.print(text.load_line(report.model, load), style="bold")
    console.print(text.speeds_table(report))
    for line in (*text.ratio_lines(report), *text.limit_lines(report), *text.saved_lines(report)):
        console.print(line)
    if report.step_parts_s:
        console.print(text.parts_table(report))
    for line in text.setting_lines(report.sides, report.machine, interrupted=report.interrupted):
        console.print(line, style="dim")


@click.group(cls=WorkloadGroup, run=measure, options=throughput_options)
def throughput() -> None:
    """Output tokens per second of a workload: cascade on and off, the machine's limit."""
