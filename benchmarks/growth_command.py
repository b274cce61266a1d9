"""`python -m benchmarks growth`: how speed and planning time grow with sequences and with the shared prefix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.console import error_console, result_console, run_bar
from cascade_llm.cli.field_options import SectionedCommand, engine_options, model_option, take_engine
from cascade_llm.cli.output_files import Outputs, output_options, write_json_file
from cascade_llm.errors import ConfigError

if TYPE_CHECKING:
    from benchmarks.growth import GrowthPoint, GrowthResult
    from cascade_llm.bench.sides import Run

__all__ = ["growth"]

DECODE_RUNS: tuple[Run, ...] = ("first", "warm")
"""Prefill is no part of what is drawn, and takes most of a long prefix's time."""


@click.command(cls=SectionedCommand)
@model_option
@click.option("--batches", default="1,4,16,64,256", show_default=True, help="Numbers of sequences.")
@click.option("--prefix-lens", default="0,512,1024,2048,4096,7936", show_default=True, help="Shared tokens.")
@click.option("--at-batch", type=int, default=16, show_default=True, help="Sequences while the prefix grows.")
@click.option("--at-prefix", type=int, default=1024, show_default=True, help="Shared tokens while the batch grows.")
@click.option("--suffix-len", type=int, default=32, show_default=True, help="Own prompt tokens of each request.")
@click.option("--output-len", type=int, default=16, show_default=True, help="Generated tokens of each request.")
@click.option("--repeat", type=click.IntRange(min=1), default=2, show_default=True, help="Turns for each point.")
@click.option("--resume", is_flag=True, help="Keep the points that --output has already, and measure the others.")
@output_options
@engine_options(without=("enable_cascade_attention",))
def growth(
    *,
    out: Outputs,
    model: str,
    batches: str,
    prefix_lens: str,
    at_batch: int,
    at_prefix: int,
    suffix_len: int,
    output_len: int,
    repeat: int,
    resume: bool,
    **arguments: Any,
) -> None:
    """Decode speed with cascade on and off, planning time and share of the limit, over batch and prefix length.

    Engines are opened once for all points. Each point's result goes to --output as soon as it is there.
    """
    options = take_engine(arguments)
    output = out.output
    if resume and output is None:
        raise click.UsageError("--resume needs --output, the file to go on with.")
    out.check(resume=resume)
    from benchmarks import growth_report as text
    from benchmarks.growth import GrowthPoint, growth_loads, growth_result
    from benchmarks.many_loads import compare_each, read_results
    from cascade_llm.bench.machine import describe_machine
    from cascade_llm.bench.setup import open_model
    from cascade_llm.bench.throughput import num_runs

    points = [GrowthPoint(batch, at_prefix) for batch in _numbers("--batches", batches, 1)]
    points += [GrowthPoint(at_batch, length) for length in _numbers("--prefix-lens", prefix_lens, 0)]
    bench = open_model(model, options)
    settings = {"model": model, "suffix_len": suffix_len, "output_len": output_len, "options": options}
    loads = growth_loads(bench, points, suffix_len=suffix_len, output_len=output_len)
    done: dict[GrowthPoint, GrowthResult] = {}
    record: dict[str, Any] = {"settings": settings, "machine": describe_machine(), "sides": {}}
    if resume and output is not None and output.exists():
        before, done = read_results(output, "growth", settings, _results)
        record["sides"] = before.get("sides", {})
    wanted = {str(point): (point, load) for point, load in loads.items() if point not in done}
    total = sum(num_runs(2, repeat, load, with_off=True, runs=DECODE_RUNS) + 2 for _, load in wanted.values())
    with run_bar(total) as on_run:
        try:
            reports = compare_each(
                bench,
                {name: load for name, (_, load) in wanted.items()},
                repeat=repeat,
                runs=DECODE_RUNS,
                on_run=on_run,
            )
            for name, report in reports if wanted else ():
                if report.interrupted:
                    break
                point = wanted[name][0]
                done[point] = growth_result(point, report)
                record["sides"] = {side: dict(flags) for side, flags in report.sides.items()}
                if output is not None:
                    write_json_file(output, {**record, "points": _as_dicts(done)})
                error_console().print(text.result_line(done[point]), style="dim")
        except KeyboardInterrupt:
            if not done:
                raise
    results = [done[point] for point in loads if point in done]
    if not results:
        raise click.Abort
    out.deliver(
        {**record, "points": _as_dicts({result.point: result for result in results})},
        lambda: result_console().print(text.growth_table(results)),
        lambda: text.charts(results, at_batch=at_batch, at_prefix=at_prefix),
        columns=4,
    )
    if len(results) < len(loads):
        if output is not None:
            error_console().print(f"{len(results)} of {len(loads)} points: --resume measures the others", style="dim")
        raise click.Abort


def _as_dicts(results: Mapping[GrowthPoint, GrowthResult]) -> dict[str, Any]:
    return {str(point): result.as_dict() for point, result in results.items()}


def _results(written: Any) -> dict[GrowthPoint, GrowthResult]:
    """The results in a file."""
    from benchmarks.growth import GrowthResult

    results = [GrowthResult.from_dict(result) for result in written["points"].values()]
    return {result.point: result for result in results}


def _numbers(option: str, text: str, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} is {text!r}: write integers with commas between") from None
    if min(numbers) < least:
        raise ConfigError(f"{option} has {min(numbers)}: numbers must be {least} or larger")
    return numbers
