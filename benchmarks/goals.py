"""The loads by which the CPU engine is judged, and the ratios to another engine that it is to reach."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cascade_llm.bench.load import Load
from cascade_llm.bench.reading import Spread
from cascade_llm.bench.setup import BenchModel
from cascade_llm.bench.throughput import ThroughputReport
from cascade_llm.bench.workloads import ForestWorkload, SharedPrefixWorkload, Workload
from cascade_llm.errors import ConfigError, nearest_name_hint

__all__ = ["GOALS", "RIVAL", "Goal", "GoalResult", "choose_goals", "goal_loads", "goal_result"]


RIVAL = "vllm"
"""The engine that the goals are set over: the fastest of those that were measured on shared prefixes."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A load, and how many times as fast as the other engine it is to run."""

    title: str
    workload: Workload
    decode: float | None
    """Prompts cached, after the first token."""
    cold: float | None
    """From an empty prefix cache."""
    temperature: float = 0.0
    top_p: float = 1.0


GOALS: Mapping[str, Goal] = {
    "none": Goal(
        title="no sharing, 16 x 256 tokens, 64 out",
        workload=SharedPrefixWorkload(prefix_len=0, num_requests=16, suffix_len=256, output_len=64),
        decode=1.25,
        cold=1.2,
    ),
    "512x16": Goal(
        title="512 shared + 16 own, x 16, 64 out",
        workload=SharedPrefixWorkload(prefix_len=512, num_requests=16, suffix_len=16, output_len=64),
        decode=1.3,
        cold=1.2,
    ),
    "2048x32": Goal(
        title="2048 shared + 32 own, x 32, 64 out",
        workload=SharedPrefixWorkload(prefix_len=2048, num_requests=32, suffix_len=32, output_len=64),
        decode=1.7,
        cold=1.6,
    ),
    "2048x64": Goal(
        title="2048 shared + 32 own, x 64, 32 out",
        workload=SharedPrefixWorkload(prefix_len=2048, num_requests=64, suffix_len=32, output_len=32),
        decode=1.9,
        cold=1.7,
    ),
    "6144x16": Goal(
        title="6144 shared + 32 own, x 16, 32 out",
        workload=SharedPrefixWorkload(prefix_len=6144, num_requests=16, suffix_len=32, output_len=32),
        decode=2.2,
        cold=1.8,
    ),
    "4x1024": Goal(
        title="4 prefixes of 1024 over 32 requests, 64 out",
        workload=ForestWorkload(groups=4, prompts_per_group=8, prefix_len=1024, suffix_len=32, output_len=64),
        decode=1.7,
        cold=1.5,
    ),
    "one": Goal(
        title="one request, 128 in, 128 out",
        workload=SharedPrefixWorkload(prefix_len=0, num_requests=1, suffix_len=128, output_len=128),
        decode=1.2,
        cold=None,
    ),
    "sampled": Goal(
        title="2048 shared + 32 own, x 64, 32 out, temperature 0.8, top_p 0.95",
        workload=SharedPrefixWorkload(prefix_len=2048, num_requests=64, suffix_len=32, output_len=32),
        decode=None,
        cold=None,
        temperature=0.8,
        top_p=0.95,
    ),
}
"""By the name that the command line takes."""


@dataclass(frozen=True)
class GoalResult:
    """One load measured; ratios are None without the other engine."""

    name: str
    title: str
    tokens_per_s: Mapping[str, Mapping[str, Spread]]
    """By side, then by "decode" and "cold"."""
    ratio: Mapping[str, Mapping[str, Spread]]
    """The same, of the first side over each other one."""
    share_of_limit: Mapping[str, float | None]
    """Of the first side."""
    goal: Mapping[str, float | None]
    peak_memory_bytes: Mapping[str, int]
    equal_plans: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By other side: the quantities in which it ran the same steps as the first."""
    pairs: Mapping[str, int] = field(default_factory=dict)
    """By other side of ours: pairs of short turns, of which "decode" has the median ratio and its quartiles."""

    def reached(self, other: str, quantity: str) -> bool | None:
        """Whether the median ratio is the goal's or better; None where there is no goal or no reading."""
        goal, ratio = self.goal_over(other, quantity), self.ratio.get(other, {}).get(quantity)
        return None if goal is None or ratio is None else ratio.median >= goal

    def goal_over(self, other: str, quantity: str) -> float | None:
        """What the ratio is to be; goals are set over one engine alone."""
        return self.goal.get(quantity) if other == RIVAL else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> GoalResult:
        """What `as_dict` wrote."""

        def spreads(sides: Mapping[str, Any]) -> dict[str, dict[str, Spread]]:
            return {side: {name: Spread(**spread) for name, spread in of.items()} for side, of in sides.items()}

        values = dict(written)
        return cls(**{**values, "tokens_per_s": spreads(values["tokens_per_s"]), "ratio": spreads(values["ratio"])})


def choose_goals(names: Sequence[str]) -> dict[str, Goal]:
    """The goals of these names, in the table's order; all where none is named."""
    for name in names:
        if name not in GOALS:
            raise ConfigError(f"unknown load {name!r}: {nearest_name_hint(name, GOALS)}")
    return {name: goal for name, goal in GOALS.items() if not names or name in names}


def goal_loads(model: BenchModel, goals: Mapping[str, Goal]) -> dict[str, Load]:
    """Their requests; raises `ConfigError` where one does not fit the model's context."""
    return {
        name: model.load(goal.workload, temperature=goal.temperature, top_p=goal.top_p) for name, goal in goals.items()
    }


def goal_result(name: str, report: ThroughputReport) -> GoalResult:
    """What a measured load came to."""
    goal = GOALS[name]
    quantities = [quantity for quantity in ("decode", "cold") if quantity in report.quantities()]

    def by_quantity(values: Iterable[Spread]) -> dict[str, Spread]:
        return dict(zip(quantities, values, strict=True))

    return GoalResult(
        name=name,
        title=goal.title,
        tokens_per_s={
            side: by_quantity(report.tokens_per_s(side, quantity) for quantity in quantities)
            for side in report.readings
        },
        ratio={
            other: by_quantity(report.ratio(other, quantity) for quantity in quantities)
            for other in list(report.readings)[1:]
        },
        share_of_limit={quantity: report.share_of_limit(report.main, quantity) for quantity in quantities},
        goal={"decode": goal.decode, "cold": goal.cold},
        peak_memory_bytes=dict(report.peak_memory_bytes),
        equal_plans={
            other: [quantity for quantity in quantities if report.has_equal_plans(other, quantity)]
            for other in list(report.readings)[1:]
        },
        pairs={other: len(paired.step_s) for other, paired in report.paired.items()},
    )
