"""Growth curves in tables and charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from benchmarks.growth import GrowthResult
from cascade_llm.cli.charts import Lines

__all__ = ["charts", "growth_table", "result_line"]


def growth_table(results: Sequence[GrowthResult]) -> Table:
    """One row per point."""
    table = Table()
    for heading in ("sequences", "shared", "on, tok/s", "off, tok/s", "speed-up", "from, to", "of limit"):
        table.add_column(heading, justify="right")
    table.add_column("planning, ms", justify="right")
    table.add_column("step, ms", justify="right")
    for result in results:
        on, off = result.tokens_per_s
        share = result.share_of_limit[on]
        table.add_row(
            str(result.batch),
            str(result.prefix_len),
            *(f"{result.tokens_per_s[side].median:,.0f}" for side in (on, off)),
            f"{result.speedup.median:.2f}",
            f"{result.speedup.low:.2f} to {result.speedup.high:.2f}"
            + ("\nequal plans" if result.has_equal_plans else ""),
            "" if share is None else f"{share:.0%}",
            f"{result.planning_s[on] * 1e3:.2f}" if on in result.planning_s else "",
            f"{result.step_s[on] * 1e3:.1f}" if on in result.step_s else "",
        )
    return table


def result_line(result: GrowthResult) -> str:
    """One point in short, for while others run."""
    on = next(iter(result.tokens_per_s))
    share, planning_s = result.share_of_limit[on], result.planning_s.get(on)
    parts = [
        f"{result.tokens_per_s[on].median:,.0f} tok/s",
        f"{result.speedup.median:.2f} times off",
        "" if share is None else f"{share:.0%} of the limit",
        "" if planning_s is None else f"planning {planning_s * 1e3:.2f} ms a step",
    ]
    return f"{result.batch} sequences, {result.prefix_len} shared tokens: {', '.join(part for part in parts if part)}"


def charts(results: Sequence[GrowthResult], *, at_batch: int, at_prefix: int) -> list[Lines]:
    """Speed, speed-up, share of the limit and planning: over the batch, then over the prefix."""
    over_batch = [result for result in results if result.prefix_len == at_prefix]
    over_prefix = [result for result in results if result.batch == at_batch]
    return [
        *_along(over_batch, "sequences", f"{at_prefix} shared tokens", lambda result: result.batch, log_x=True),
        *_along(over_prefix, "shared tokens", f"{at_batch} sequences", lambda result: result.prefix_len),
    ]


def _along(
    results: Sequence[GrowthResult], axis: str, fixed: str, place: Callable[[GrowthResult], int], log_x: bool = False
) -> list[Lines]:
    if not results:
        return []
    results = sorted(results, key=place)
    sides = list(results[0].tokens_per_s)

    def curve(value: Callable[[GrowthResult], float | None]) -> tuple[list[float], list[float]]:
        drawn = [(float(place(result)), y) for result in results if (y := value(result)) is not None]
        return [x for x, _ in drawn], [y for _, y in drawn]

    def by_side(value: Callable[[GrowthResult, str], float | None]) -> dict[str, tuple[list[float], list[float]]]:
        return {side: curve(lambda result, side=side: value(result, side)) for side in sides}  # type: ignore[misc]

    def lines(
        title: str, y_label: str, curves: dict[str, tuple[list[float], list[float]]], mark: float | None = None
    ) -> Lines:
        return Lines(title=f"{title}, {fixed}", x_label=axis, y_label=y_label, curves=curves, log_x=log_x, mark=mark)

    return [
        lines("decode", "tok/s", by_side(lambda result, side: result.tokens_per_s[side].median)),
        lines("on over off", "times as fast", {"median": curve(lambda result: result.speedup.median)}, mark=1.0),
        lines("share of the limit", "", by_side(lambda result, side: result.share_of_limit[side]), mark=1.0),
        lines(
            "planning",
            "ms a step",
            by_side(lambda result, side: result.planning_s[side] * 1e3 if side in result.planning_s else None),
        ),
    ]
