"""`cascade-llm bench latency`: how long requests wait and how even their tokens come, under arrivals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cascade_llm.cli.bench_throughput import OpenOthers, load_options
from cascade_llm.cli.bench_workloads import WorkloadGroup
from cascade_llm.cli.console import print_json, result_console, run_bar
from cascade_llm.cli.field_options import engine_options, model_option, take_engine
from cascade_llm.cli.output_files import check_output_files, output_options, write_json_file

if TYPE_CHECKING:
    from cascade_llm.bench.latency import LatencyReport
    from cascade_llm.bench.load import History, Load
    from cascade_llm.bench.online import Arrivals
    from cascade_llm.bench.workloads import Workload

__all__ = ["arrival_options", "latency", "latency_options", "make_arrivals", "measure", "with_history"]

Command = TypeVar("Command", bound=Callable[..., Any])


def arrival_options(command: Command) -> Command:
    """When requests arrive; see `make_arrivals`."""
    for option in reversed(
        (
            click.option("--request-rate", type=float, help="Requests a second, by a Poisson process."),
            click.option("--concurrency", type=int, help="Users, each sending a request when the last has ended."),
            click.option("--arrival-seed", type=int, default=0, show_default=True, help="Of the Poisson process."),
            click.option(
                "--history",
                type=click.Choice(["real", "recorded"]),
                default="real",
                show_default=True,
                help="What later turns go on from: the engine's answers, or ones that are the same for every engine.",
            ),
        )
    ):
        command = option(command)
    return command


def with_history(load: Load, history: History) -> Load:
    """The load, its later turns going on from real or recorded answers."""
    return load.with_recorded_history() if history == "recorded" and load.has_turns else load


def make_arrivals(request_rate: float | None, concurrency: int | None, seed: int) -> Arrivals:
    """By rate or by concurrency; all at once where neither is given."""
    from cascade_llm.bench.online import AllAtOnce, AtConcurrency, AtRate

    if request_rate is not None and concurrency is not None:
        raise click.UsageError("--request-rate and --concurrency exclude each other: give one.")
    if request_rate is not None:
        return AtRate(request_rate, seed)
    return AllAtOnce() if concurrency is None else AtConcurrency(concurrency)


def latency_options(command: Command) -> Command:
    """All options of a workload's command."""
    off = click.option("--off/--no-off", "with_off", default=True, help="Compare with cascade attention off.")
    records = engine_options(without=("enable_cascade_attention",))
    return model_option(arrival_options(load_options(off(output_options(records(command))))))


def measure(
    workload: Workload,
    *,
    model: str,
    open_others: OpenOthers = lambda bench, load: [],
    request_rate: float | None,
    concurrency: int | None,
    arrival_seed: int,
    history: History,
    temperature: float | None,
    top_p: float,
    repeat: int,
    with_off: bool,
    as_json: bool,
    output: Path | None,
    plot: Path | None,
    force: bool,
    **arguments: Any,
) -> None:
    """Measure a workload and show the result; `arguments`: the engine's options, as the command line gives them."""
    options = take_engine(arguments)
    check_output_files(output, plot, force=force)
    arrivals = make_arrivals(request_rate, concurrency, arrival_seed)
    from cascade_llm.bench.compare import opened_sides
    from cascade_llm.bench.latency import LatencyReport, measure_latency
    from cascade_llm.bench.setup import open_model

    bench = open_model(model, options)
    load = with_history(bench.load(workload, temperature=temperature, top_p=top_p), history)
    others = open_others(bench, load)
    report = LatencyReport(model, load, arrivals)
    num_sides = 1 + with_off + len(others)
    with (
        run_bar(num_sides * (repeat + 1) + len(others)) as on_run,
        opened_sides(bench, load, with_off=with_off, others=others, on_run=on_run) as sides,
    ):
        measure_latency(report, sides, repeat=repeat, on_run=on_run)
    if output is not None:
        write_json_file(output, report.as_dict())
    if plot is not None:
        _draw(report, plot)
    if as_json:
        print_json(report.as_dict(), indent=2)
    else:
        _print(report)
    if report.interrupted:
        raise click.Abort


def _print(report: LatencyReport) -> None:
    from cascade_llm.cli import latency_report as text

    console = result_console()
    console.print(text.title(report), style="bold")
    console.print(text.latency_table(report.runs))
    if len(report.runs) > 1:
        console.print(text.ratio_table(report))
    for line in text.setting_lines(report):
        console.print(line, style="dim")


def _draw(report: LatencyReport, path: Path) -> None:
    from cascade_llm.cli.charts import draw_charts
    from cascade_llm.cli.latency_report import charts, title

    draw_charts(path, charts(report.runs), caption=title(report))


@click.group(cls=WorkloadGroup, run=measure, options=latency_options)
def latency() -> None:
    """Time to first token, between tokens, to the end: cascade on and off; arrivals by the clock."""
