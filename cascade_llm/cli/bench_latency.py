"""`cascade-llm bench latency`: how long requests wait and how even their tokens come, under arrivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.bench_throughput import OpenOthers, load_options, off_option
from cascade_llm.cli.bench_workloads import WorkloadGroup
from cascade_llm.cli.console import run_bar
from cascade_llm.cli.field_options import engine_options, model_option, stacked, take_engine
from cascade_llm.cli.output_files import Outputs, output_options

if TYPE_CHECKING:
    from cascade_llm.bench.load import History, Load
    from cascade_llm.bench.online import Arrivals
    from cascade_llm.bench.workloads import Workload

__all__ = ["arrival_options", "latency", "latency_options", "measure", "several_arrivals_options", "with_history"]


_common_options = stacked(
    click.option("--arrival-seed", type=int, default=0, show_default=True, help="Of the Poisson process."),
    click.option(
        "--history",
        type=click.Choice(["real", "recorded"]),
        default="real",
        show_default=True,
        help="What later turns go on from: the engine's answers, or ones that are the same for every engine.",
    ),
)


def arrival_options(command: Callable[..., None]) -> Callable[..., None]:
    """When requests arrive, which the command gets as `arrivals`; and `--history`."""

    @wraps(command)
    def call(*, request_rate: float | None, concurrency: int | None, arrival_seed: int, **arguments: Any) -> None:
        command(arrivals=_arrivals(request_rate, concurrency, arrival_seed), **arguments)

    return stacked(
        click.option("--request-rate", type=float, help="Requests a second, by a Poisson process."),
        click.option("--concurrency", type=int, help="Users, each sending a request when the last has ended."),
        _common_options,
    )(call)


def several_arrivals_options(command: Callable[..., None]) -> Callable[..., None]:
    """The same, several rates or numbers of users among it, which the command gets as a list of `arrivals`."""

    @wraps(command)
    def call(*, request_rate: Sequence[float], concurrency: Sequence[int], arrival_seed: int, **arguments: Any) -> None:
        paces = [*((rate, None) for rate in request_rate), *((None, users) for users in concurrency)]
        if request_rate and concurrency:
            raise click.UsageError("--request-rate and --concurrency exclude each other: give one.")
        command(arrivals=[_arrivals(*pace, arrival_seed) for pace in paces or [(None, None)]], **arguments)

    return stacked(
        click.option(
            "--request-rate",
            type=float,
            multiple=True,
            help="Requests a second (Poisson); may be repeated.",
        ),
        click.option(
            "--concurrency",
            type=int,
            multiple=True,
            help="Users, each sending a request when the last has ended; may be repeated.",
        ),
        _common_options,
    )(call)


def with_history(load: Load, history: History) -> Load:
    """The load, its later turns going on from real or recorded answers."""
    return load.with_recorded_history() if history == "recorded" and load.has_turns else load


def _arrivals(request_rate: float | None, concurrency: int | None, seed: int) -> Arrivals:
    """By rate or by concurrency; all at once where neither is given."""
    from cascade_llm.bench.online import AllAtOnce, AtConcurrency, AtRate

    if request_rate is not None and concurrency is not None:
        raise click.UsageError("--request-rate and --concurrency exclude each other: give one.")
    if request_rate is not None:
        return AtRate(request_rate, seed)
    return AllAtOnce() if concurrency is None else AtConcurrency(concurrency)


latency_options = stacked(
    model_option,
    arrival_options,
    load_options,
    off_option,
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
    arrivals: Arrivals,
    history: History,
    temperature: float | None,
    top_p: float,
    repeat: int,
    with_off: bool,
    **arguments: Any,
) -> None:
    """Measure a workload and show the result; `arguments`: the engine's options, as the command line gives them."""
    options = take_engine(arguments)
    out.check()
    from cascade_llm.bench.latency import LatencyReport, measure_latency
    from cascade_llm.bench.setup import open_model
    from cascade_llm.bench.sides import opened_sides

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
    from cascade_llm.cli.latency_report import charts, print_latency, title

    out.deliver(report.as_dict(), lambda: print_latency(report), lambda: charts(report.runs), caption=title(report))
    if report.interrupted:
        raise click.Abort


@click.group(cls=WorkloadGroup, run=measure, options=latency_options)
def latency() -> None:
    """Time to first token, between tokens, to the end: cascade on and off; arrivals by the clock."""
