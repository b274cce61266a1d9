"""Throughput of a load, engines taking turns: cascade attention on, off, and another engine.

One repeat of a side is a *cold* run (its prefix cache is empty, so prefill is part of it), a run for the *first* token
with prompts cached, and a *warm* one (the same, to the end). Decode is what the warm run takes beyond the first tokens.
Sides take turns within each repeat, every other time in reverse, so that what else the machine does meets all of them;
ratios are taken turn by turn. Decode with cascade attention on against off is compared in shorter turns: see `paired`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cascade_llm.bench.load import Load
from cascade_llm.bench.machine import describe_machine
from cascade_llm.bench.machine_limits import MachineLimits
from cascade_llm.bench.own_memory import peak_bytes
from cascade_llm.bench.paired import PairedDecode, measure_paired
from cascade_llm.bench.reading import Reading, Spread, spread_of_ratios
from cascade_llm.bench.setup import BenchModel
from cascade_llm.bench.sides import RUNS, EngineSide, OpenSide, Run, Side, opened_sides
from cascade_llm.bench.step_work import ModelShape, Work, floor_s, step_work, total_work
from cascade_llm.errors import ConfigError

__all__ = ["Floor", "ThroughputReport", "compare", "decode_tokens_per_s", "floors_of", "measure_sides", "num_runs"]

Readings = dict[Run, list[Reading]]
OnRun = Callable[[str], None]


@dataclass(frozen=True)
class Floor:
    """The least that a run needs on this machine."""

    work: Work
    seconds: float


@dataclass
class ThroughputReport:
    """All readings, and what they were made with; filled while the measurement goes on."""

    model: str
    load: Load
    limits: MachineLimits
    sides: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """By side, first the one that others are compared with: all that was chosen for it."""
    readings: dict[str, Readings] = field(default_factory=dict)
    paired: dict[str, PairedDecode] = field(default_factory=dict)
    """By other side of ours: decode in short turns with the first."""
    floors: dict[Run, Floor] = field(default_factory=dict)
    """By run, from the step plans of the first side."""
    step_parts_s: dict[str, dict[str, float]] = field(default_factory=dict)
    """By side: mean seconds of a warm step by part."""
    unshared_steps: Mapping[str, int] = field(default_factory=dict)
    """Why how many steps of the first side shared nothing."""
    peak_memory_bytes: dict[str, int] = field(default_factory=dict)
    """By side, since it was opened; only of sides that have processes of their own."""
    interrupted: bool = False
    machine: Mapping[str, Any] = field(default_factory=describe_machine)

    @property
    def main(self) -> str:
        """The side that others are compared with."""
        return next(iter(self.sides))

    def quantities(self) -> list[str]:
        """What was measured of every side: of "cold", "warm" and "decode" those with readings."""
        return [name for name in ("cold", "warm", "decode") if all(self.values(side, name) for side in self.readings)]

    def values(self, side: str, quantity: str) -> list[float]:
        """Output tokens per second, one per repeat."""
        readings = self.readings[side]
        if quantity == "decode":
            return decode_tokens_per_s(readings, self.load)
        return [reading.tokens_per_s for reading in readings.get(_as_run(quantity), ())]

    def tokens_per_s(self, side: str, quantity: str) -> Spread:
        """Output tokens per second."""
        return Spread.of(self.values(side, quantity))

    def compared(self, other: str) -> list[str]:
        """The quantities that have a ratio."""
        names = self.quantities()
        return names if other not in self.paired or "decode" in names else [*names, "decode"]

    def ratio(self, other: str, quantity: str) -> Spread:
        """The main side's speed over another's: above 1 the main side is faster.

        Turn by turn, with the lowest and highest; of decode on two engines of ours by `paired`, with the quartiles.
        """
        if quantity == "decode" and other in self.paired:
            return self.paired[other].ratio
        return spread_of_ratios(self.values(self.main, quantity), self.values(other, quantity))

    def has_equal_plans(self, other: str, quantity: str) -> bool:
        """Whether two engines of ours ran the same steps, none with a shared level: a ratio is noise then."""
        if quantity == "decode" and other in self.paired:
            return self.paired[other].has_equal_plans
        run: Run = "cold" if quantity == "cold" else "warm"
        counters = [reading.counters for side in (self.main, other) for reading in self.readings[side].get(run, ())]
        return bool(counters) and all(of_run.get("cascade_steps") == 0 for of_run in counters)

    def floor_tokens_per_s(self, quantity: str) -> float | None:
        """Output tokens per second at the machine's limit."""
        if quantity == "decode":
            if "warm" not in self.floors or "first" not in self.floors:
                return None
            decode_s = self.floors["warm"].seconds - self.floors["first"].seconds
            tokens = self.load.num_generated - self.load.num_sequences
        elif (run := _as_run(quantity)) in self.floors:
            decode_s, tokens = self.floors[run].seconds, self.load.num_generated
        else:
            return None
        return tokens / decode_s if decode_s > 0 else None

    def share_of_limit(self, side: str, quantity: str) -> float | None:
        """Measured speed over the limit's: 1 cannot be passed."""
        floor = self.floor_tokens_per_s(quantity)
        return None if floor is None else self.tokens_per_s(side, quantity).median / floor

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        quantities = self.quantities()
        return {
            "model": self.model,
            "load": self.load.as_dict(),
            "sides": {side: dict(flags) for side, flags in self.sides.items()},
            "results": {
                side: {
                    "tokens_per_s": {name: asdict(self.tokens_per_s(side, name)) for name in quantities},
                    "share_of_limit": {name: self.share_of_limit(side, name) for name in quantities},
                    "elapsed_s": {run: [reading.elapsed_s for reading in of_run] for run, of_run in readings.items()},
                    "counters": {run: dict(of_run[0].counters) for run, of_run in readings.items() if of_run},
                    "step_parts_s": self.step_parts_s.get(side),
                }
                for side, readings in self.readings.items()
            },
            "ratio": {
                other: {name: asdict(self.ratio(other, name)) for name in self.compared(other)}
                for other in list(self.readings)[1:]
            },
            "equal_plans": {
                other: [name for name in self.compared(other) if self.has_equal_plans(other, name)]
                for other in list(self.readings)[1:]
            },
            "paired": {other: paired.as_dict() for other, paired in self.paired.items()},
            "limit": {
                "machine": asdict(self.limits),
                "tokens_per_s": {name: self.floor_tokens_per_s(name) for name in quantities},
                "runs": {run: {"seconds": f.seconds, **f.work._asdict()} for run, f in self.floors.items()},
            },
            "peak_memory_bytes": dict(self.peak_memory_bytes),
            "unshared_steps": dict(self.unshared_steps),
            "interrupted": self.interrupted,
            "machine": dict(self.machine),
        }


def decode_tokens_per_s(readings: Mapping[Run, Sequence[Reading]], load: Load) -> list[float]:
    """Tokens after the first of each sequence, over the time that they took; empty where there is no such time."""
    tokens = load.num_generated - load.num_sequences
    gaps = [
        warm.elapsed_s - first.elapsed_s
        for warm, first in zip(readings.get("warm", ()), readings.get("first", ()), strict=False)
    ]
    return [tokens / gap for gap in gaps] if tokens and gaps and min(gaps) > 0 else []


def measure_sides(
    report: ThroughputReport,
    sides: Sequence[Side],
    shape: ModelShape,
    *,
    repeat: int = 3,
    runs: Sequence[Run] = RUNS,
    split_steps: bool = True,
    on_run: OnRun = lambda run: None,
) -> ThroughputReport:
    """Fill a report: an uncounted run of each side, then `repeat` turns; the first side must be an `EngineSide`.

    An interruption after the first whole turn ends the measurement and is noted in the report; before, it is raised.

    Args:
        report: with no readings yet
        sides: they are not closed
        shape: of the model, for the limits
        runs: of a turn; without "cold" prefixes that are cached from other loads may stay
        split_steps: make one more run of our sides on the CPU, for where a step's time goes
        on_run: called with a name before each of the `num_runs(...)` runs
    """
    if repeat < 1:
        raise ConfigError(f"repeat is {repeat}: it must be 1 or larger")
    main = sides[0]
    assert isinstance(main, EngineSide)
    runs = _runs_of(report.load, runs)
    report.sides.update({side.name: side.flags for side in sides})
    unshared_before = Counter(main.llm.plan_report()["unshared_steps"])
    try:
        for side in sides:
            on_run(f"{side.name}, not counted")
            side.run("cold" if "cold" in runs else "warm")
        for turn in range(repeat):
            _one_turn(report, sides if turn % 2 == 0 else sides[::-1], runs, on_run)
        for side in sides[1:]:
            if isinstance(side, EngineSide):
                on_run(f"{main.name} and {side.name}, in short turns")
                if (paired := measure_paired(main, side)) is not None:
                    report.paired[side.name] = paired
        if split_steps:
            _split_steps(report, sides, on_run)
    except KeyboardInterrupt:
        if not report.readings:
            raise
        report.interrupted = True
    report.floors.update(floors_of(main, report.limits, shape))
    report.unshared_steps = Counter(main.llm.plan_report()["unshared_steps"]) - unshared_before
    report.peak_memory_bytes.update(_peak_memory(sides))
    return report


def compare(
    model: BenchModel,
    load: Load,
    *,
    with_off: bool = True,
    others: Sequence[OpenSide] = (),
    repeat: int = 3,
    split_steps: bool = True,
    on_run: OnRun = lambda run: None,
) -> ThroughputReport:
    """Open cascade attention on, off and other engines, where wanted, and measure a load; see `measure_sides`."""
    report = ThroughputReport(model.name, load, model.limits())
    with opened_sides(model, load, with_off=with_off, others=others, on_run=on_run) as sides:
        return measure_sides(report, sides, model.shape(), repeat=repeat, split_steps=split_steps, on_run=on_run)


def num_runs(num_sides: int, repeat: int, load: Load, *, with_off: bool, runs: Sequence[Run] = RUNS) -> int:
    """Runs of `measure_sides`, the uncounted first ones and the short turns included, those for a step's parts not."""
    return num_sides * (1 + repeat * len(_runs_of(load, runs))) + with_off


def floors_of(side: EngineSide, limits: MachineLimits, shape: ModelShape) -> dict[Run, Floor]:
    """The least time of the steps that a side made in its last runs."""
    floors = {}
    for run, plans in side.plans.items():
        works = [step_work(plan, shape) for plan in plans]
        seconds = floor_s(
            works,
            bytes_per_s=limits.bytes_per_s,
            flops_per_s=limits.flops_per_s,
            linear_flops_per_s=limits.linear_flops_per_s,
        )
        floors[run] = Floor(total_work(works), seconds)
    return floors


def _runs_of(load: Load, runs: Sequence[Run]) -> tuple[Run, ...]:
    """Without "first" where turns go on from answers: one token of each would be another conversation."""
    return tuple(run for run in runs if run != "first" or not load.has_turns)


def _one_turn(report: ThroughputReport, sides: Sequence[Side], runs: Sequence[Run], on_run: OnRun) -> None:
    """All runs of each side; kept only as a whole, so that every side has as many readings."""
    turn: dict[str, dict[Run, Reading]] = {}
    for side in sides:
        turn[side.name] = {}
        for run in runs:
            on_run(f"{side.name}, {run}")
            turn[side.name][run] = side.run(run)
    for name in report.sides:
        for run, reading in turn[name].items():
            report.readings.setdefault(name, {}).setdefault(run, []).append(reading)


def _split_steps(report: ThroughputReport, sides: Sequence[Side], on_run: OnRun) -> None:
    for side in sides:
        if isinstance(side, EngineSide) and side.runs_here and side.llm.facts.device.type == "cpu":
            on_run(f"{side.name}, parts of a step")
            report.step_parts_s[side.name] = side.split_step_time()


def _peak_memory(sides: Sequence[Side]) -> dict[str, int]:
    """By side; ours where one engine alone is in this process."""
    engines = [side for side in sides if isinstance(side, EngineSide)]
    memory = {engines[0].name: peak_bytes()} if len(engines) == 1 and engines[0].runs_here else {}
    told = {side.name: side.peak_memory_bytes() for side in sides if not isinstance(side, EngineSide)}
    return memory | {name: num_bytes for name, num_bytes in told.items() if num_bytes is not None}


def _as_run(quantity: str) -> Run:
    assert quantity in ("cold", "warm")
    return "cold" if quantity == "cold" else "warm"
