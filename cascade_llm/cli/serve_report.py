"""Measured servers in a table and charts: a row for each server and each of the arrivals."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from cascade_llm.bench.latency import QUANTITIES, LatencyReport, LatencyRun, summary_spread
from cascade_llm.bench.online import AtConcurrency, AtRate
from cascade_llm.bench.reading import Spread
from cascade_llm.bench.serve_sweep import ServeSweep
from cascade_llm.cli.charts import Chart, Lines
from cascade_llm.cli.console import result_console
from cascade_llm.cli.latency_report import charts
from cascade_llm.cli.throughput_report import load_line, setting_lines

__all__ = ["print_sweep", "sweep_charts", "sweep_title"]

SHOWN = (("ttft", 50), ("ttft", 99), ("itl", 50), ("itl", 99))
DRAWN = (50, 99)
"""Percentiles."""


def print_sweep(sweep: ServeSweep) -> None:
    """The table, errors of requests that failed, and what was chosen."""
    console = result_console()
    console.print(sweep_title(sweep), style="bold")
    console.print(_table(sweep))
    if sweep.slo is not None:
        console.print(
            f"goodput: requests a second whose first token came in {sweep.slo.ttft_s * 1e3:g} ms and the others "
            f"{sweep.slo.tpot_s * 1e3:g} ms apart in the mean"
        )
    if sweep.errors:
        console.print(f"{len(sweep.errors)} requests failed; the first: {sweep.errors[0]}", style="red")
    last = sweep.reports[-1]
    for line in setting_lines(sweep.reports[0].sides, last.machine, interrupted=sweep.is_interrupted):
        console.print(line, style="dim")


def sweep_title(sweep: ServeSweep) -> str:
    """What was run."""
    return load_line(sweep.reports[0].model, sweep.reports[0].load)


def sweep_charts(sweep: ServeSweep) -> Sequence[Chart]:
    """Curves over the rate or the users, where there are several; else bars of the times."""
    measured = [report for report in sweep.reports if report.runs]
    if len(measured) < 2:
        return charts(measured[0].runs)
    rates = [_pace(report) for report in measured]
    label = "requests a second" if isinstance(measured[0].arrivals, AtRate) else "users"
    drawn: list[Chart] = []
    for quantity, meaning in QUANTITIES.items():
        curves = {}
        for server in measured[0].runs:
            for percentile in DRAWN:
                spreads = [summary_spread(report.runs.get(server, []), quantity, percentile) for report in measured]
                points = [(rate, s.median * 1e3) for rate, s in zip(rates, spreads, strict=True) if s is not None]
                curves[f"{server}, p{percentile}"] = ([x for x, _ in points], [y for _, y in points])
        drawn.append(
            Lines(title=meaning, x_label=label, y_label="ms", curves=curves, curves_per_color=len(DRAWN), log_y=True)
        )
    if sweep.slo is not None:
        good = {
            server: (rates, [_goodput(report.runs.get(server, [])) or 0.0 for report in measured])
            for server in measured[0].runs
        }
        drawn.append(Lines(title="goodput", x_label=label, y_label="requests a second", curves=good))
    return drawn


def _table(sweep: ServeSweep) -> Table:
    """Milliseconds; medians over the runs."""
    table = Table(title="milliseconds to the first token (TTFT) and between tokens (ITL)", title_justify="left")
    table.add_column("server")
    table.add_column("arrivals", no_wrap=True)
    for quantity, percentile in SHOWN:
        table.add_column(f"{quantity.upper()} p{percentile}", justify="right", no_wrap=True)
    for heading in ("tok/s", *(("goodput", "in time") if sweep.slo else ()), "failed"):
        table.add_column(heading, justify="right")
    for report in sweep.reports:
        for server, runs in report.runs.items():
            spreads = [summary_spread(runs, quantity, percentile) for quantity, percentile in SHOWN]
            times = ["" if spread is None else f"{spread.median * 1e3:,.1f}" for spread in spreads]
            speed = Spread.of([run.num_generated / run.elapsed_s for run in runs]).median
            table.add_row(
                server,
                _pace_text(report),
                *times,
                f"{speed:,.1f}",
                *((f"{_goodput(runs):.2f}", f"{_share_in_time(runs):.0%}") if sweep.slo else ()),
                str(sum(run.counters["failed"] for run in runs)),
            )
    return table


def _goodput(runs: Sequence[LatencyRun]) -> float:
    """Requests a second that were in time; 0 without runs."""
    return Spread.of([run.counters["in_time"] / run.elapsed_s for run in runs]).median if runs else 0.0


def _share_in_time(runs: Sequence[LatencyRun]) -> float:
    """Of all requests that were sent."""
    return sum(run.counters["in_time"] for run in runs) / sum(run.counters["requests"] for run in runs)


def _pace(report: LatencyReport) -> float:
    arrivals = report.arrivals
    if isinstance(arrivals, AtRate):
        return arrivals.per_s
    return float(arrivals.users) if isinstance(arrivals, AtConcurrency) else 0.0


def _pace_text(report: LatencyReport) -> str:
    arrivals, pace = report.arrivals, f"{_pace(report):g}"
    if isinstance(arrivals, AtRate):
        return f"{pace} a second"
    return f"{pace} users" if isinstance(arrivals, AtConcurrency) else "all at once"
