"""Latency of a load whose requests arrive by the clock or at a concurrency, engines taking turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cascade_llm.bench.load import Load
from cascade_llm.bench.machine import describe_machine
from cascade_llm.bench.online import Arrivals, RequestTiming
from cascade_llm.bench.reading import Reading, Spread
from cascade_llm.bench.sides import Side
from cascade_llm.errors import ConfigError

__all__ = [
    "PERCENTILES",
    "QUANTITIES",
    "STATISTICS",
    "LatencyReport",
    "LatencyRun",
    "Summary",
    "measure_latency",
    "summarize",
    "summary_spread",
    "summary_value",
]

PERCENTILES = (50, 90, 99)
STATISTICS: Mapping[str, str | int] = {"mean": "mean", **{f"p{percentile}": percentile for percentile in PERCENTILES}}
"""What is compared, by the name in reports."""
QUANTITIES = {"ttft": "time to first token", "itl": "between tokens", "e2e": "whole request"}
"""Of a request, and what each is called."""


@dataclass(frozen=True)
class Summary:
    """Many times of one kind, in seconds."""

    mean: float
    percentiles: Mapping[int, float]
    """By the percentage of values that are at or below it."""
    highest: float


@dataclass(frozen=True)
class LatencyRun:
    """One run of one engine."""

    elapsed_s: float
    num_generated: int
    ttft: Summary | None
    """None where an engine does not tell when its tokens came."""
    itl: Summary | None
    """None there, and where no sequence has two tokens."""
    e2e: Summary
    counters: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, timings: Sequence[RequestTiming], reading: Reading) -> LatencyRun:
        """Of the timings of a run."""
        gaps = [gap for timing in timings for gap in timing.gaps_s]
        first = [ttft_s for timing in timings if (ttft_s := timing.ttft_s) is not None]
        return cls(
            elapsed_s=reading.elapsed_s,
            num_generated=reading.num_generated,
            ttft=summarize(first) if first else None,
            itl=summarize(gaps) if gaps else None,
            e2e=summarize([timing.e2e_s for timing in timings]),
            counters=reading.counters,
        )


@dataclass
class LatencyReport:
    """All runs; filled while the measurement goes on."""

    model: str
    load: Load
    arrivals: Arrivals
    sides: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    runs: dict[str, list[LatencyRun]] = field(default_factory=dict)
    interrupted: bool = False
    machine: Mapping[str, Any] = field(default_factory=describe_machine)

    @property
    def main(self) -> str:
        """The side that others are compared with: the first."""
        return next(iter(self.runs))

    def ratio(self, other: str, quantity: str, statistic: str | int) -> Spread | None:
        """Another side's time over the main one's, turn by turn: above 1 the main side is faster."""
        own, others = (
            [summary_value(run, quantity, statistic) for run in self.runs[side]] for side in (self.main, other)
        )
        ratios = [b / a for a, b in zip(own, others, strict=True) if a and b is not None]
        return Spread.of(ratios) if ratios else None

    def ratios(self) -> dict[str, dict[str, dict[str, Spread]]]:
        """By other side, quantity and statistic ("mean", "p50", ...); what is not told is left out."""
        return {
            other: {
                quantity: {
                    name: ratio
                    for name, statistic in STATISTICS.items()
                    if (ratio := self.ratio(other, quantity, statistic)) is not None
                }
                for quantity in QUANTITIES
            }
            for other in list(self.runs)[1:]
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "load": self.load.as_dict(),
            "ratio": {
                other: {
                    quantity: {name: asdict(spread) for name, spread in of_quantity.items()}
                    for quantity, of_quantity in of_other.items()
                }
                for other, of_other in self.ratios().items()
            },
            "arrivals": {"kind": type(self.arrivals).__name__, **vars(self.arrivals)},
            "sides": {side: dict(flags) for side, flags in self.sides.items()},
            "runs": {side: [asdict(run) for run in runs] for side, runs in self.runs.items()},
            "interrupted": self.interrupted,
            "machine": dict(self.machine),
        }


def summary_value(run: LatencyRun, quantity: str, statistic: str | int) -> float | None:
    """Of "ttft", "itl" or "e2e" the "mean", the "highest" or a percentile; seconds, None where it is not told."""
    summary: Summary | None = getattr(run, quantity)
    if summary is None:
        return None
    value: float = summary.percentiles[statistic] if isinstance(statistic, int) else getattr(summary, statistic)
    return value


def summary_spread(runs: Sequence[LatencyRun], quantity: str, statistic: str | int) -> Spread | None:
    """`summary_value` over several runs."""
    values = [value for run in runs if (value := summary_value(run, quantity, statistic)) is not None]
    return Spread.of(values) if values else None


def summarize(values: Sequence[float]) -> Summary:
    """Mean, percentiles (the smallest value that so many percent do not exceed) and the highest; not empty."""
    ordered = sorted(values)
    return Summary(
        mean=sum(ordered) / len(ordered),
        percentiles={p: ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in PERCENTILES},
        highest=ordered[-1],
    )


def measure_latency(
    report: LatencyReport,
    sides: Sequence[Side],
    *,
    repeat: int = 3,
    on_run: Callable[[str], None] = lambda run: None,
) -> LatencyReport:
    """Fill a report: an uncounted run of each side, then `repeat` runs in turns, each with an empty prefix cache.

    An interruption after the first whole turn ends the measurement and is noted in the report; before, it is raised.
    """
    if repeat < 1:
        raise ConfigError(f"repeat is {repeat}: it must be 1 or larger")
    report.sides.update({side.name: side.flags for side in sides})
    try:
        for side in sides:
            on_run(f"{side.name}, not counted")
            side.run_online(report.arrivals)
        for number in range(repeat):
            turn = {}
            for side in sides[:: 1 if number % 2 == 0 else -1]:
                on_run(side.name)
                run = side.run_online(report.arrivals)
                turn[side.name] = LatencyRun.of(run.timings, run.reading)
            for side in sides:
                report.runs.setdefault(side.name, []).append(turn[side.name])
    except KeyboardInterrupt:
        if not report.runs:
            raise
        report.interrupted = True
    return report
