"""The goal table in words, Markdown and charts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from benchmarks.goals import RIVAL, GoalResult
from cascade_llm.cli.charts import Bars
from cascade_llm.cli.console import format_bytes
from cascade_llm.cli.throughput_report import machine_line

__all__ = ["caption", "charts", "comparison_lines", "goals_table", "markdown", "result_line"]

QUANTITIES = {"decode": "decode", "cold": "from cold"}


def goals_table(results: Sequence[GoalResult]) -> Table:
    """One row per load, other side and quantity."""
    table = Table()
    table.add_column("load")
    table.add_column("")
    for heading in ("ours tok/s", "other tok/s", "ratio", "from, to", "goal", "", "share of limit"):
        table.add_column(heading, justify="right")
    for cells in _rows(results):
        table.add_row(*cells)
    return table


def markdown(results: Sequence[GoalResult]) -> str:
    """The table and what else was compared, for a document."""
    headings = ("load", "", "ours tok/s", "other tok/s", "ratio", "from, to", "goal", "", "share of limit")
    lines = [f"| {' | '.join(headings)} |", f"| {' | '.join('---' for _ in headings)} |"]
    lines += [f"| {' | '.join(cells)} |" for cells in _rows(results)]
    for line in comparison_lines(results):
        lines += ["", line]
    return "\n".join(lines) + "\n"


def comparison_lines(results: Sequence[GoalResult]) -> Iterator[str]:
    """Sampling against greedy, and memory."""
    by_name = {result.name: result for result in results}
    greedy, sampled = by_name.get("2048x64"), by_name.get("sampled")
    if greedy is not None and sampled is not None:
        for side, speeds in sampled.tokens_per_s.items():
            other = greedy.tokens_per_s.get(side, {}).get("decode")
            if other is not None and "decode" in speeds:
                share = speeds["decode"].median / other.median
                yield f"Sampling at temperature 0.8, top_p 0.95 decodes at {share:.1%} of greedy's speed on {side}."
    if any(result.pairs for result in results):
        yield "Decode over cascade off: median and quartiles of pairs of short turns; else lowest and highest turn."
    memory = results[-1].peak_memory_bytes if results else {}
    if memory:
        yield "Peak memory: " + ", ".join(f"{side} {format_bytes(size)}" for side, size in memory.items()) + "."


def result_line(result: GoalResult) -> str:
    """One load in short, for while others run."""
    parts = [
        f"{QUANTITIES[name]} {ratio.median:.2f} times {other}"
        for other, ratios in result.ratio.items()
        for name, ratio in ratios.items()
    ]
    own = next(iter(result.tokens_per_s.values()))
    parts = parts or [f"{QUANTITIES[name]} {spread.median:,.0f} tok/s" for name, spread in own.items()]
    return f"{result.title}: {', '.join(parts)}"


def charts(results: Sequence[GoalResult]) -> list[Bars]:
    """Ratios against their goals, and speeds."""
    names = [result.name for result in results]
    drawn = []
    for quantity, meaning in QUANTITIES.items():
        others = list(dict.fromkeys(other for result in results for other in result.ratio))
        if others:
            ratios = {other: [result.ratio.get(other, {}).get(quantity) for result in results] for other in others}
            drawn.append(
                Bars(
                    title=f"{meaning}: times as fast",
                    y_label="ratio",
                    groups=names,
                    values={f"over {o}": [None if r is None else r.median for r in row] for o, row in ratios.items()},
                    ranges={
                        f"over {o}": [None if r is None else (r.low, r.high) for r in row] for o, row in ratios.items()
                    },
                    marks=[result.goal_over(RIVAL, quantity) for result in results] if RIVAL in others else (),
                    mark_label=f"goal over {RIVAL}",
                )
            )
        sides = list(dict.fromkeys(side for result in results for side in result.tokens_per_s))
        speeds = {side: [result.tokens_per_s.get(side, {}).get(quantity) for result in results] for side in sides}
        drawn.append(
            Bars(
                title=f"{meaning}: output tokens per second",
                y_label="tok/s",
                groups=names,
                values={side: [None if s is None else s.median for s in row] for side, row in speeds.items()},
                ranges={side: [None if s is None else (s.low, s.high) for s in row] for side, row in speeds.items()},
            )
        )
    return drawn


def caption(machine: Mapping[str, Any], repeat: int) -> str:
    """Below the charts."""
    return f"{machine_line(machine)}; median and range of {repeat} turns"


def _rows(results: Sequence[GoalResult]) -> Iterator[list[str]]:
    for result in results:
        main = next(iter(result.tokens_per_s))
        for quantity, meaning in QUANTITIES.items():
            own = result.tokens_per_s[main].get(quantity)
            if own is None:
                continue
            share = result.share_of_limit.get(quantity)
            last = "" if share is None else f"{share:.0%}"
            if not result.ratio:
                yield [result.title, meaning, f"{own.median:,.0f}", "", "", "", "", "", last]
            for other, ratios in result.ratio.items():
                ratio, reached = ratios[quantity], result.reached(other, quantity)
                goal = result.goal_over(other, quantity)
                verdict = "" if reached is None else "reached" if reached else "missed"
                if quantity in result.equal_plans.get(other, ()):
                    verdict = "equal plans"
                yield [
                    result.title,
                    f"{meaning}, over {other}",
                    f"{own.median:,.0f}",
                    f"{result.tokens_per_s[other][quantity].median:,.0f}",
                    f"{ratio.median:.2f}",
                    f"{ratio.low:.2f} to {ratio.high:.2f}",
                    "" if goal is None else f"{goal:g}",
                    verdict,
                    last,
                ]
