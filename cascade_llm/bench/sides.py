"""What takes turns in a measurement: engines of ours that differ in one option, and other engines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from cascade_llm.bench.instruments import recorded_plans, timed_parts
from cascade_llm.bench.load import Load
from cascade_llm.bench.online import AllAtOnce, Arrivals, OnlineRun, run_requests
from cascade_llm.bench.reading import Reading, measure
from cascade_llm.bench.setup import BenchModel
from cascade_llm.llm import LLM
from cascade_llm.plan import StepPlan
from cascade_llm.worker.executor import LocalExecutor

__all__ = ["RUNS", "EngineSide", "OpenSide", "Run", "Side", "opened_sides"]

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

    @property
    def runs_here(self) -> bool:
        """Whether steps run in this process, where they can be taken apart."""
        return isinstance(self.llm.engine.executor, LocalExecutor)

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
        output_len = 1 if run == "first" else None
        params = [self.load.params(index, output_len) for index in range(len(self.load.requests))]
        return measure(self.llm, [request.token_ids for request in self.load.requests], params)[1]


OpenSide = Callable[[], Side]
"""Starts another engine, with the first of the loads that are measured and room for all of them."""


@contextmanager
def opened_sides(
    model: BenchModel,
    *loads: Load,
    with_off: bool,
    others: Sequence[OpenSide] = (),
    on_run: Callable[[str], None] = lambda run: None,
) -> Iterator[list[Side]]:
    """Cascade on, off and other engines, where wanted, each with the first load and room for all."""
    with ExitStack() as stack:
        sides: list[Side] = []

        def add(side: Side) -> None:
            stack.callback(side.close)
            sides.append(side)

        add(EngineSide("cascade on", model.open(*loads, enable_cascade_attention=True), loads[0]))
        if with_off:
            add(EngineSide("cascade off", model.open(*loads, enable_cascade_attention=False), loads[0]))
        for open_side in others:
            on_run("starting another engine")
            add(open_side())
        yield sides
