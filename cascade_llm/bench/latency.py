"""Latency of a load whose requests arrive by the clock or at a concurrency, engines taking turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cascade_llm.bench.load import Load
from cascade_llm.bench.machine import describe_machine
from cascade_llm.bench.online import Arrivals, RequestTiming, run_requests
from cascade_llm.bench.reading import Spread
from cascade_llm.errors import ConfigError
from cascade_llm.llm import LLM

__all__ = [
    "PERCENTILES",
    "QUANTITIES",
    "LatencyReport",
    "LatencyRun",
    "Summary",
    "measure_latency",
    "summarize",
    "summary_spread",
]

PERCENTILES = (50, 90, 99)
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
    ttft: Summary
    itl: Summary | None
    """None where no sequence has two tokens."""
    e2e: Summary
    counters: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, timings: Sequence[RequestTiming], elapsed_s: float, counters: Mapping[str, int] | None = None
    ) -> LatencyRun:
        """Of the timings of a run."""
        gaps = [gap for timing in timings for gap in timing.gaps_s]
        return cls(
            elapsed_s=elapsed_s,
            num_generated=sum(len(times) for timing in timings for times in timing.token_times_s),
            ttft=summarize([timing.ttft_s for timing in timings]),
            itl=summarize(gaps) if gaps else None,
            e2e=summarize([timing.e2e_s for timing in timings]),
            counters=counters or {},
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

    def spread(self, side: str, quantity: str, statistic: str | int) -> Spread | None:
        """See `summary_spread`."""
        return summary_spread(self.runs[side], quantity, statistic)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "load": self.load.as_dict(),
            "arrivals": {"kind": type(self.arrivals).__name__, **vars(self.arrivals)},
            "sides": {side: dict(flags) for side, flags in self.sides.items()},
            "runs": {side: [asdict(run) for run in runs] for side, runs in self.runs.items()},
            "interrupted": self.interrupted,
            "machine": dict(self.machine),
        }


def summary_spread(runs: Sequence[LatencyRun], quantity: str, statistic: str | int) -> Spread | None:
    """Of "ttft", "itl" or "e2e" the "mean", the "highest" or a percentile, over several runs; seconds."""
    summaries = [summary for run in runs if (summary := getattr(run, quantity)) is not None]
    if not summaries:
        return None
    if isinstance(statistic, int):
        return Spread.of([summary.percentiles[statistic] for summary in summaries])
    return Spread.of([getattr(summary, statistic) for summary in summaries])


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
    engines: Mapping[str, LLM],
    *,
    repeat: int = 3,
    on_run: Callable[[str], None] = lambda run: None,
) -> LatencyReport:
    """Fill a report: an uncounted run of each engine, then `repeat` runs in turns, each with an empty prefix cache.

    An interruption after the first whole turn ends the measurement and is noted in the report; before, it is raised.
    """
    if repeat < 1:
        raise ConfigError(f"repeat is {repeat}: it must be 1 or larger")
    report.sides.update({name: llm.options.given() for name, llm in engines.items()})
    try:
        for name, llm in engines.items():
            on_run(f"{name}, not counted")
            _run(llm, report)
        for number in range(repeat):
            turn = {}
            for name in list(engines)[:: 1 if number % 2 == 0 else -1]:
                on_run(name)
                turn[name] = _run(engines[name], report)
            for name in engines:
                report.runs.setdefault(name, []).append(turn[name])
    except KeyboardInterrupt:
        if not report.runs:
            raise
        report.interrupted = True
    return report


def _run(llm: LLM, report: LatencyReport) -> LatencyRun:
    llm.reset_prefix_cache()
    run = run_requests(llm, report.load, report.arrivals)
    return LatencyRun.of(run.timings, run.reading.elapsed_s, run.reading.counters)
