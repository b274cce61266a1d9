"""One run of a load, and several runs of one quantity."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cascade_llm.llm import LLM
from cascade_llm.outputs import RequestOutput
from cascade_llm.sampling_params import SamplingParams

__all__ = ["Reading", "Spread", "measure", "spread_of_ratios"]

COUNTERS = (
    "steps",
    "cascade_steps",
    "prefilled_tokens",
    "recomputed_tokens",
    "cached_tokens",
    "generated_tokens",
    "preemptions",
    "kv_bytes_read",
    "kv_bytes_saved",
)


@dataclass(frozen=True)
class Reading:
    """One run of a load."""

    elapsed_s: float
    num_generated: int
    """Tokens."""
    counters: Mapping[str, int] = field(default_factory=dict)
    """What `LLM.stats()` gained; empty for an engine that does not tell."""

    @classmethod
    def since(cls, before: Mapping[str, int], llm: LLM, elapsed_s: float) -> Reading:
        """Of what an engine has done since its `stats()` were `before`."""
        after = llm.stats()
        gained = {name: after[name] - before[name] for name in COUNTERS}
        return cls(elapsed_s, gained["generated_tokens"], gained)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the whole time, prefill included."""
        return self.num_generated / self.elapsed_s


@dataclass(frozen=True)
class Spread:
    """Several readings of one quantity."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Median, smallest and largest."""
        return Spread(statistics.median(values), min(values), max(values))

    @staticmethod
    def quartiles(values: Sequence[float]) -> Spread:
        """Median, and the values that a quarter and three quarters of two or more do not exceed."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


def spread_of_ratios(values: Sequence[float], others: Sequence[float]) -> Spread:
    """Of readings that were made in turns: each value over the one of its own turn."""
    return Spread.of([value / other for value, other in zip(values, others, strict=False)])


def measure(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    progress: bool = False,
) -> tuple[list[RequestOutput], Reading]:
    """One run, timed from the first prompt's arrival to the last token."""
    before = llm.stats()
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=progress)
    return outputs, Reading.since(before, llm, time.perf_counter() - start_s)
