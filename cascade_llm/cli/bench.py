"""`cascade-llm bench`: measurements on the user's own machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.console import print_json, result_console
from cascade_llm.cli.field_options import SectionedCommand, engine_options, model_option, take_engine

if TYPE_CHECKING:
    from cascade_llm.bench.throughput import ThroughputReport

__all__ = ["bench"]


@click.group()
def bench() -> None:
    """Measure on this machine."""


@bench.command(cls=SectionedCommand)
@model_option
@click.option("--prefix-len", type=int, default=2048, show_default=True, help="Tokens that all requests share.")
@click.option("--num-requests", type=int, default=32, show_default=True, help="Requests at once.")
@click.option("--suffix-len", type=int, default=32, show_default=True, help="Own prompt tokens of each request.")
@click.option("--output-len", type=int, default=32, show_default=True, help="Generated tokens of each request.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random token ids.")
@click.option("--repeat", type=int, default=3, show_default=True, help="Runs per engine; the median counts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@engine_options(without=("enable_cascade_attention",))
def throughput(
    model: str,
    prefix_len: int,
    num_requests: int,
    suffix_len: int,
    output_len: int,
    seed: int,
    repeat: int,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Output tokens per second of a shared-prefix load, cascade attention on against off."""
    options = take_engine(arguments)
    from cascade_llm.bench.throughput import SharedPrefixLoad, measure_throughput, num_runs
    from cascade_llm.cli.throughput_table import run_bar

    load = SharedPrefixLoad(
        prefix_len=prefix_len, num_requests=num_requests, suffix_len=suffix_len, output_len=output_len, seed=seed
    )
    with run_bar(num_runs(repeat)) as on_run:
        report = measure_throughput(model, load, options, repeat=repeat, on_run=on_run)
    if as_json:
        print_json(report.as_dict(), indent=2)
    else:
        _print(report)


def _print(report: ThroughputReport) -> None:
    from cascade_llm.cli.throughput_table import ratio_lines, throughput_table

    console, load, machine = result_console(), report.load, report.machine
    console.print(
        f"{report.model}: {load.num_requests} requests, {load.prefix_len:,} shared + {load.suffix_len:,} own prompt "
        f"tokens, {load.output_len:,} generated each",
        style="bold",
    )
    console.print(throughput_table(report.readings))
    for line in ratio_lines(report.readings):
        console.print(line)
    for reason, num_steps in report.unshared_steps.items():
        console.print(f"{num_steps} steps of the cascade engine shared nothing: {reason}")
    console.print(
        f"torch {machine['versions']['torch']}, {machine['cpu']['name']}, {machine['cpu']['torch_threads']} threads",
        style="dim",
    )
