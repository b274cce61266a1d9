"""`cascade-llm bench throughput`: output tokens per second of a workload, and how far from the machine's limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cascade_llm.cli.bench_workloads import WorkloadGroup
from cascade_llm.cli.console import error_console, print_json, result_console
from cascade_llm.cli.field_options import engine_options, model_option, take_engine
from cascade_llm.cli.output_files import check_output_files, output_options, write_json_file

if TYPE_CHECKING:
    from cascade_llm.bench.peer_environment import PeerInterpreter
    from cascade_llm.bench.setup import BenchModel
    from cascade_llm.bench.throughput import ThroughputReport
    from cascade_llm.bench.workloads import Workload

__all__ = ["choose_peer", "load_options", "peer_options", "throughput"]

Command = TypeVar("Command", bound=Callable[..., Any])


def load_options(command: Command) -> Command:
    """How tokens are drawn, and how often all is run."""
    for option in reversed(
        (
            click.option("--temperature", type=float, help="0 is greedy; default: the workload's own."),
            click.option("--top-p", type=float, default=1.0, show_default=True, help="Of the sampling."),
            click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True, help="Turns."),
        )
    ):
        command = option(command)
    return command


def peer_options(command: Command) -> Command:
    """Another engine to compare with."""
    for option in reversed(
        (
            click.option("--against", help="Another engine to take turns with: vllm, transformers or llama.cpp."),
            click.option("--peer-python", type=click.Path(path_type=Path), help="The interpreter that has it."),
            click.option("--install-peer", is_flag=True, help="Make an environment for it in the user's cache folder."),
        )
    ):
        command = option(command)
    return command


def choose_peer(name: str | None, model: BenchModel, *, python: Path | None, install: bool) -> PeerInterpreter | None:
    """The interpreter of another engine; None where none is wanted. An installation says what it does."""
    if name is None and (python is not None or install):
        raise click.UsageError("--peer-python and --install-peer are for --against: name the engine.")
    if name is None:
        return None
    from cascade_llm.bench.peer_side import peer_for

    def say(what: str) -> None:
        error_console().print(f"{name}: {what}", style="dim")

    return peer_for(name, model, python=python, install=install, on_install=say)


def _options(command: Command) -> Command:
    off = click.option("--off/--no-off", "with_off", default=True, help="Compare with cascade attention off.")
    parts = click.option("--parts/--no-parts", default=True, help="One more run for where a step's time goes.")
    records = engine_options(without=("enable_cascade_attention",))
    return model_option(load_options(off(parts(peer_options(output_options(records(command)))))))


def _run(workload: Workload, **arguments: Any) -> None:
    options = take_engine(arguments)
    _measure(workload, options=options, **arguments)


def _measure(
    workload: Workload,
    *,
    model: str,
    options: dict[str, Any],
    temperature: float | None,
    top_p: float,
    repeat: int,
    with_off: bool,
    parts: bool,
    against: str | None,
    peer_python: Path | None,
    install_peer: bool,
    as_json: bool,
    output: Path | None,
    plot: Path | None,
    force: bool,
) -> None:
    check_output_files(output, plot, force=force)
    from cascade_llm.bench.compare import compare
    from cascade_llm.bench.setup import open_model
    from cascade_llm.bench.throughput import num_runs
    from cascade_llm.cli.demo_runs import run_bar

    bench = open_model(model, options)
    load = bench.load(workload, temperature=temperature, top_p=top_p)
    peer = choose_peer(against, bench, python=peer_python, install=install_peer)
    num_sides = 1 + with_off + (peer is not None)
    with run_bar(num_runs(num_sides, repeat, load, with_off=with_off)) as on_run:
        report = compare(bench, load, with_off=with_off, peer=peer, repeat=repeat, split_steps=parts, on_run=on_run)
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


def _print(report: ThroughputReport) -> None:
    from cascade_llm.cli import throughput_report as text

    console, load = result_console(), report.load
    console.print(text.load_line(report.model, load), style="bold")
    console.print(text.speeds_table(report))
    for line in (*text.ratio_lines(report), *text.limit_lines(report), *text.saved_lines(report)):
        console.print(line)
    if report.step_parts_s:
        console.print(text.parts_table(report))
    for line in text.setting_lines(report):
        console.print(line, style="dim")


def _draw(report: ThroughputReport, path: Path) -> None:
    from cascade_llm.cli.charts import draw_charts
    from cascade_llm.cli.throughput_report import charts, load_line

    draw_charts(path, charts(report), caption=load_line(report.model, report.load))


@click.group(cls=WorkloadGroup, run=_run, options=_options)
def throughput() -> None:
    """Output tokens per second of a workload: cascade on and off, another engine, the machine's limit."""
