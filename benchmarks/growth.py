"""How speed, planning time and distance from the limit grow with the batch and with the shared prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cascade_llm.bench.load import Load
from cascade_llm.bench.reading import Spread
from cascade_llm.bench.setup import BenchModel
from cascade_llm.bench.throughput import ThroughputReport
from cascade_llm.bench.workloads import SharedPrefixWorkload

__all__ = ["GrowthPoint", "GrowthResult", "growth_loads", "growth_result"]


@dataclass(frozen=True, order=True)
class GrowthPoint:
    """So many sequences behind so many shared tokens."""

    batch: int
    prefix_len: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.prefix_len}"


@dataclass(frozen=True, kw_only=True)
class GrowthResult:
    """One point; speeds in output tokens per second, prompts cached."""

    batch: int
    prefix_len: int
    quantity: str
    """"decode", or "warm" where outputs are too short to tell decode apart."""
    tokens_per_s: Mapping[str, Spread]
    """By side."""
    speedup: Spread
    """Of cascade on over off."""
    has_equal_plans: bool
    share_of_limit: Mapping[str, float | None]
    """By side."""
    planning_s: Mapping[str, float]
    """By side: scheduling and preparing a step, the mean of the run that times a step's parts; empty on a GPU."""
    step_s: Mapping[str, float]
    """The whole step of the same run."""

    @property
    def point(self) -> GrowthPoint:
        """Where it stands."""
        return GrowthPoint(self.batch, self.prefix_len)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> GrowthResult:
        """What `as_dict` wrote."""
        speeds = {side: Spread(**spread) for side, spread in written["tokens_per_s"].items()}
        return cls(**{**written, "tokens_per_s": speeds, "speedup": Spread(**written["speedup"])})


def growth_loads(
    model: BenchModel, points: Sequence[GrowthPoint], *, suffix_len: int, output_len: int
) -> dict[GrowthPoint, Load]:
    """The load of each point; `ConfigError` where one does not fit the model's context."""
    return {
        point: model.load(
            SharedPrefixWorkload(
                prefix_len=point.prefix_len, num_requests=point.batch, suffix_len=suffix_len, output_len=output_len
            )
        )
        for point in dict.fromkeys(points)
    }


def growth_result(point: GrowthPoint, report: ThroughputReport) -> GrowthResult:
    """What a measured load came to."""
    quantity = "decode" if "decode" in report.quantities() else "warm"
    (other,) = list(report.readings)[1:]
    return GrowthResult(
        batch=point.batch,
        prefix_len=point.prefix_len,
        quantity=quantity,
        tokens_per_s={side: report.tokens_per_s(side, quantity) for side in report.readings},
        speedup=report.ratio(other, quantity),
        has_equal_plans=report.has_equal_plans(other, quantity),
        share_of_limit={side: report.share_of_limit(side, quantity) for side in report.readings},
        planning_s={side: parts["planning"] for side, parts in report.step_parts_s.items()},
        step_s={side: sum(parts.values()) for side, parts in report.step_parts_s.items()},
    )
