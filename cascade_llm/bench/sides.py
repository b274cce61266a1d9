"""What takes turns in a measurement: engines of ours that differ in one option, and other engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from cascade_llm.bench.instruments import recorded_plans, timed_parts
from cascade_llm.bench.load import Load
from cascade_llm.bench.online import AllAtOnce, Arrivals, OnlineRun, run_requests
from cascade_llm.bench.reading import Reading, measure
from cascade_llm.llm import LLM
from cascade_llm.plan import StepPlan
from cascade_llm.sampling_params import SamplingParams

__all__ = ["RUNS", "EngineSide", "Run", "Side", "load_params"]

Run = Literal["cold", "warm", "first"]
RUNS: tuple[Run, ...] = ("cold", "first", "warm")
"""In this order: the prefix cache is empty; prompts are cached and one token is generated; prompts are cached."""


class Side(ABC):
    """An engine with a load."""

    def __init__(self, name: str, load: Load, flags: Mapping[str, Any]) -> None:
        self.name, self.load, self.flags = name, load, dict(flags)
        """`flags`: all that was chosen for it, for reports."""

    def use_load(self, load: Load) -> None:
        """Take another load, which fits what this side was opened for."""
        self.load = load

    @abstractmethod
    def run(self, run: Run) -> Reading:
        """Run the load once and time it."""

    @abstractmethod
    def run_online(self, arrivals: Arrivals) -> OnlineRun:
        """Run the load once from an empty prefix cache, requests arriving as it says."""

    @abstractmethod
    def close(self) -> None:
        """Free what it holds."""

    def peak_memory_bytes(self) -> int | None:
        """The most memory that it has held; None where it shares a process with others."""
        return None


class EngineSide(Side):
    """An engine of ours; keeps the step plans of its last run of each kind."""

    def __init__(self, name: str, llm: LLM, load: Load) -> None:
        super().__init__(name, load, llm.options.given())
        self.llm = llm
        self.plans: dict[Run, list[StepPlan]] = {}

    def use_load(self, load: Load) -> None:
        """See `Side`; forgets the plans of the load before."""
        super().use_load(load)
        self.plans = {}

    def run(self, run: Run) -> Reading:
        """See `Side`."""
        if run == "cold":
            self.llm.reset_prefix_cache()
        with recorded_plans(self.llm) as plans:
            reading = self._reading(run)
        self.plans[run] = plans
        return reading

    def run_online(self, arrivals: Arrivals) -> OnlineRun:
        """See `Side`."""
        self.llm.reset_prefix_cache()
        return run_requests(self.llm, self.load, arrivals)

    def split_step_time(self, run: Run = "warm") -> dict[str, float]:
        """Mean seconds of a step by part, from a run that is not counted; for engines on the CPU."""
        with timed_parts(self.llm) as clock:
            self._reading(run)
        return clock.per_step_s()

    def close(self) -> None:
        """See `Side`."""
        self.llm.close()

    def _reading(self, run: Run) -> Reading:
        if self.load.has_turns:
            return run_requests(self.llm, self.load, AllAtOnce()).reading
        params = load_params(self.load, output_len=1 if run == "first" else None)
        return measure(self.llm, [request.token_ids for request in self.load.requests], params)[1]


def load_params(load: Load, *, output_len: int | None = None) -> list[SamplingParams]:
    """One per request; `output_len` takes the place of the load's own."""
    return [
        SamplingParams(
            temperature=load.temperature,
            top_p=load.top_p,
            max_tokens=output_len or request.output_len,
            n=request.n,
            seed=index,
            ignore_eos=True,
        )
        for index, request in enumerate(load.requests)
    ]
