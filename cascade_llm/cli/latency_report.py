"""A latency measurement in tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from cascade_llm.bench.latency import PERCENTILES, QUANTITIES, LatencyReport, LatencyRun, summary_spread
from cascade_llm.bench.online import Arrivals, AtConcurrency, AtRate
from cascade_llm.bench.reading import Spread
from cascade_llm.cli.charts import Bars
from cascade_llm.cli.console import result_console
from cascade_llm.cli.throughput_report import load_line, setting_lines

__all__ = ["charts", "print_latency", "title"]

Runs = Mapping[str, Sequence[LatencyRun]]
"""By engine."""


def print_latency(report: LatencyReport) -> None:
    """Times, ratios where there are several engines, and what was chosen."""
    console = result_console()
    console.print(title(report), style="bold")
    console.print(_latency_table(report.runs))
    if len(report.runs) > 1:
        console.print(_ratio_table(report))
    for line in setting_lines(report.sides, report.machine, interrupted=report.interrupted):
        console.print(line, style="dim")


def title(report: LatencyReport) -> str:
    """What was run."""
    return f"{load_line(report.model, report.load)}; {_arrivals_line(report.arrivals)}"


def _arrivals_line(arrivals: Arrivals) -> str:
    if isinstance(arrivals, AtRate):
        return f"{arrivals.per_s:g} requests a second (Poisson)"
    if isinstance(arrivals, AtConcurrency):
        return f"{arrivals.users} users"
    return "all requests at once"


def _latency_table(runs: Runs) -> Table:
    """Milliseconds: medians over the runs, and the spread of the medians."""
    table = Table()
    table.add_column("engine")
    table.add_column("milliseconds")
    for heading in ("mean", *(f"p{percentile}" for percentile in PERCENTILES), "highest", "p50 over the runs"):
        table.add_column(heading, justify="right")
    for side, of_side in runs.items():
        for quantity, meaning in QUANTITIES.items():
            statistics: list[str | int] = ["mean", *PERCENTILES, "highest"]
            spreads = [summary_spread(of_side, quantity, statistic) for statistic in statistics]
            middle = summary_spread(of_side, quantity, 50)
            if middle is None and all(run.ttft is None for run in of_side):
                table.add_row(side, meaning, "not told", *[""] * (len(PERCENTILES) + 2))
            elif middle is not None:
                table.add_row(side, meaning, *map(_milliseconds, spreads), _range(middle))
        speed = Spread.of([run.num_generated / run.elapsed_s for run in of_side])
        table.add_row(side, "output tok/s", f"{speed.median:,.1f}", *[""] * (len(PERCENTILES) + 2))
    return table


def _ratio_table(report: LatencyReport) -> Table:
    """How many times as long the others take as the first side, turn by turn."""
    table = Table(title=f"times as long as {report.main}: median of the turns, lowest to highest", title_justify="left")
    table.add_column("engine")
    table.add_column("")
    shown = [f"p{percentile}" for percentile in PERCENTILES]  # the means are in the JSON
    for name in shown:
        table.add_column(name, justify="right")
    for other, quantities in report.ratios().items():
        for quantity, ratios in quantities.items():
            if ratios:
                cells = [f"{(r := ratios[name]).median:.2f} ({r.low:.2f} to {r.high:.2f})" for name in shown]
                table.add_row(other, QUANTITIES[quantity], *cells)
    return table


def charts(runs: Runs) -> list[Bars]:
    """One chart for each of the three times."""
    drawn = []
    for quantity, meaning in QUANTITIES.items():
        spreads = {
            side: [summary_spread(of_side, quantity, percentile) for percentile in PERCENTILES]
            for side, of_side in runs.items()
        }
        drawn.append(
            Bars(
                title=meaning,
                y_label="ms",
                groups=[f"p{percentile}" for percentile in PERCENTILES],
                values={side: [None if s is None else s.median * 1e3 for s in row] for side, row in spreads.items()},
                ranges={
                    side: [None if s is None else (s.low * 1e3, s.high * 1e3) for s in row]
                    for side, row in spreads.items()
                },
            )
        )
    return drawn


def _milliseconds(spread: Spread | None) -> str:
    return "" if spread is None else f"{spread.median * 1e3:,.1f}"


def _range(spread: Spread) -> str:
    return f"{spread.low * 1e3:,.1f} to {spread.high * 1e3:,.1f}"
