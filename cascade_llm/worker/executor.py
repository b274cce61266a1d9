"""Where steps are run: the engine hands an `Executor` a plan and gets a result, and knows nothing else of devices.

`LocalExecutor` runs steps in this process. `cascade_llm.worker.process_executor` runs them in processes of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.worker.model_runner import ModelRunner
from cascade_llm.worker.worker import WorkerFacts

__all__ = ["Executor", "LocalExecutor", "PendingStep"]


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that was handed to an executor."""

    plan: StepPlan
    result: Callable[[], StepResult]
    """Waits for the device, once."""


class Executor(ABC):
    """Runs step plans in the order of their submission."""

    facts: WorkerFacts
    """What was found out at start."""

    @property
    def sentinels(self) -> Sequence[int]:
        """Become ready where a process that runs steps has ended, as `multiprocessing.connection.wait` takes them."""
        return ()

    @abstractmethod
    def submit(self, plan: StepPlan) -> PendingStep:
        """Start a step. Its result is there when `result()` returns; a step that failed raises there or here."""

    @abstractmethod
    def counters(self) -> dict[str, int]:
        """How steps were run, where there are several ways; else empty."""

    @abstractmethod
    def close(self) -> None:
        """Let go of weights, pages and processes; a second call does nothing."""


class LocalExecutor(Executor):
    """One rank, in this process."""

    def __init__(self, runner: ModelRunner, facts: WorkerFacts) -> None:
        self.runner, self.facts = runner, facts
        self._counters = runner.graphs.counters if runner.graphs is not None else None

    def submit(self, plan: StepPlan) -> PendingStep:
        """See `Executor`."""
        return PendingStep(plan, self.runner.submit(plan))

    def counters(self) -> dict[str, int]:
        """See `Executor`."""
        return self._counters.as_dict() if self._counters is not None else {}

    def close(self) -> None:
        """See `Executor`; the memory is free once nobody else holds the runner."""
        self.__dict__.pop("runner", None)
