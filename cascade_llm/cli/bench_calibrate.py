"""`cascade-llm bench calibrate`: measure the cost model's constants here, keep them, and check its choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from cascade_llm.cli.console import result_console, run_bar
from cascade_llm.cli.field_options import SectionedCommand, engine_options, model_option, take_engine
from cascade_llm.cli.output_files import Outputs, output_options
from cascade_llm.config import EngineOptions
from cascade_llm.errors import ConfigError

if TYPE_CHECKING:
    from cascade_llm.bench.calibration import CheckReport
    from cascade_llm.cli.charts import Lines
    from cascade_llm.scheduler.cascade.calibration import Calibration
    from cascade_llm.scheduler.cascade.device_costs import DeviceCosts

__all__ = ["calibrate"]

UNITS = {"bytes_per_s": (1e9, "GB/s"), "flops_per_s": (1e9, "GFLOP/s"), "_s": (1e-6, "µs")}
ATTENTION = ("dtype", "device", "num_threads", "attention_backend")


@click.command(cls=SectionedCommand)
@model_option
@click.option("--seconds", type=float, default=20.0, show_default=True, help="To measure; the check takes as long.")
@click.option("--check/--no-check", default=True, help="Check the choices on trees that were not fitted to.")
@click.option("--fit/--no-fit", default=True, help="Measure constants; without, check those in use.")
@click.option("--case", "cases", multiple=True, help="Check on this tree, as '1,4,64/512,128,32'; repeatable.")
@click.option("--keep/--no-keep", default=True, help="Store the constants for engines that start from now on.")
@output_options
@engine_options(only=ATTENTION)
def calibrate(
    *,
    out: Outputs,
    model: str,
    seconds: float,
    check: bool,
    fit: bool,
    cases: tuple[str, ...],
    keep: bool,
    **arguments: Any,
) -> None:
    """Measure attention of a model's shape on this machine, so that the planner decides by what is true here.

    Attention alone is timed: no weights are read. The machine should do nothing else.
    """
    options = EngineOptions(**take_engine(arguments))
    if not seconds > 0:
        raise ConfigError(f"seconds is {seconds}: it must be positive")
    if not fit and not check:
        raise ConfigError("--no-fit with --no-check leaves nothing to do")
    out.check()
    from cascade_llm.bench.attention_cases import AttentionCase
    from cascade_llm.bench.calibration import FIT_CASES, HELD_OUT_CASES, attention_of, check_choices
    from cascade_llm.bench.calibration import calibrate as measure
    from cascade_llm.device.devices import thread_limit
    from cascade_llm.engine.cost_setup import attention_shape, calibration_path, choose_cost_model
    from cascade_llm.scheduler.cascade.calibration import write_calibration
    from cascade_llm.scheduler.cascade.cost_model import CostModel

    for name in cases:
        AttentionCase.parse(name)
    spec, choice = attention_of(model, options)
    held_out = cases or HELD_OUT_CASES
    max_levels = max(1, options.cascade.max_shared_levels)
    total = (len(FIT_CASES) if fit else 0) + (len(held_out) if check else 0)
    calibration = report = None
    with thread_limit(options.num_threads), run_bar(total) as on_case:
        cost_model, source = choose_cost_model(spec, choice.name)
        if fit:
            calibration = measure(
                spec,
                choice.name,
                choice.backend,
                cases=FIT_CASES,
                max_levels=max_levels,
                measure_s=seconds,
                on_case=on_case,
            )
            cost_model, source = CostModel(attention_shape(spec), calibration.costs), "measured now"
            if keep:
                write_calibration(calibration_path(), calibration)
        if check:
            report = check_choices(
                cost_model,
                spec,
                choice.backend,
                cases=held_out,
                max_levels=max_levels,
                measure_s=seconds,
                on_case=on_case,
            )
    record = {
        "model": model,
        "backend": choice.name,
        "constants": source,
        "costs": asdict(cost_model.costs),
        "calibration": None if calibration is None else asdict(calibration),
        "check": None if report is None else report.as_dict(),
    }

    def show() -> None:
        console = result_console()
        console.print(f"{model}, backend {choice.name}; constants: {source}", style="bold")
        console.print(_costs_table(cost_model.costs))
        if calibration is not None:
            console.print(_fit_line(calibration, str(calibration_path()) if keep else None))
        if report is not None:
            console.print(_check_table(report))
            for line in _check_lines(report):
                console.print(line)

    out.deliver(record, show, lambda: [] if report is None else _charts(report))


def _costs_table(costs: DeviceCosts) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in asdict(costs).items():
        scale, unit = next(((s, u) for end, (s, u) in UNITS.items() if name.endswith(end)), (1, ""))
        table.add_row(name, f"{value / scale:,.4g} {unit}" if unit else f"{value:,}")
    return table


def _fit_line(calibration: Calibration, path: str | None) -> str:
    kept = f"; kept in {path}" if path else "; not kept"
    return (
        f"Fit: {calibration.num_measured} plans, predicted within {calibration.median_error:.0%} (median), "
        f"{calibration.worst_error:.0%} (worst){kept}"
    )


def _check_table(report: CheckReport) -> Table:
    table = Table(title="Choices on trees that were not fitted to; microseconds per layer")
    table.add_column("nodes/tokens")
    for heading in ("plain", "", "chosen", "levels", "", "best", "levels", "regret"):
        table.add_column(heading, justify="right")
    for case in report.cases:
        table.add_row(
            case.case,
            *_pair(case.predicted_s[""], case.measured_s[""]),
            f"{1e6 * case.measured_s[case.chosen]:,.0f}",
            case.chosen or "none",
            f"({1e6 * case.predicted_s[case.chosen]:,.0f})",
            f"{1e6 * case.measured_s[case.best]:,.0f}",
            case.best or "none",
            f"{case.regret:.1%}",
            style="red" if case.loss > report.tolerance else None,
        )
    return table


def _pair(predicted_s: float, measured_s: float) -> Sequence[str]:
    """Measured, and predicted in brackets."""
    return f"{1e6 * measured_s:,.0f}", f"({1e6 * predicted_s:,.0f})"


def _check_lines(report: CheckReport) -> list[str]:
    summary, num_cases = report.as_dict(), len(report.cases)
    return [
        "In brackets what was predicted; levels are the depths of the tree that are read once for all, from 0.",
        f"Sharing or not was decided rightly in {summary['num_shared_rightly']} of {num_cases}, and which nodes in "
        f"{summary['num_right']} (times within {report.tolerance:.0%} count as equal).",
        f"Regret: {summary['mean_regret']:.1%} on average, {summary['worst_regret']:.1%} at worst; slower than plain "
        f"attention by {summary['worst_loss']:.1%} at worst. Predictions are off by {summary['median_error']:.0%} "
        "(median).",
    ]


def _charts(report: CheckReport) -> list[Lines]:
    from cascade_llm.cli.charts import Lines

    cases = sorted(report.cases, key=lambda case: case.measured_s[""])
    x = [float(index) for index, _ in enumerate(cases, start=1)]
    curves = {
        "plain, measured": (x, [1e6 * case.measured_s[""] for case in cases]),
        "plain, predicted": (x, [1e6 * case.predicted_s[""] for case in cases]),
        "chosen, measured": (x, [1e6 * case.measured_s[case.chosen] for case in cases]),
        "chosen, predicted": (x, [1e6 * case.predicted_s[case.chosen] for case in cases]),
        "best, measured": (x, [1e6 * case.measured_s[case.best] for case in cases]),
    }
    return [Lines(title="held-out trees, by time", x_label="tree", y_label="µs per layer", curves=curves, log_y=True)]
