"""What happens inside a step, observed from outside for the length of a `with` block.

Plans, and the time of planning and of what follows a step, come from the engine's own observer. For the parts inside of
a step a few callables of one engine are replaced by ones that note and call them: the engine's own code knows nothing
of it and pays nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from cascade_llm.attention.backend import PreparedAttention
from cascade_llm.engine.engine import StepEvent, StepObserver
from cascade_llm.llm import LLM
from cascade_llm.plan import CascadePlan, StepPlan
from cascade_llm.weights.linear import Linear
from cascade_llm.worker.executor import LocalExecutor

__all__ = ["STEP_PARTS", "StepClock", "recorded_plans", "timed_parts"]

STEP_PARTS = (
    "planning",
    "linear",
    "shared attention",
    "suffix attention",
    "all attention",
    "KV write",
    "sampling",
    "commit and text",
    "other",
)
"""Where a step's time goes, in the order in which it is shown; "all attention" where a backend does not tell apart."""


class StepClock:
    """Time by part of a step: each moment belongs to the part whose `lap` ends it."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_steps = 0
        self._last = 0.0

    def on_step(self, event: StepEvent) -> None:
        """A step has been planned, and begins; or its result has been taken in, and it ends."""
        if event.result is None:
            self.num_steps += 1
            self.seconds["planning"] += event.schedule_s
            self._last = time.perf_counter()
        else:
            self.seconds["commit and text"] += event.commit_s
            self._last += event.commit_s
            self.lap("sampling" if len(event.plan.sample_rows) else "other")  # the head's product has had its own lap

    def lap(self, part: str, share: float = 1.0) -> None:
        """What has passed since the last lap belongs to this part, or a share of it; the rest to the next lap's."""
        now = time.perf_counter()
        own_s = (now - self._last) * share
        self.seconds[part] += own_s
        self._last += own_s

    def per_step_s(self) -> dict[str, float]:
        """Mean seconds of a step by part, in the order of `STEP_PARTS`."""
        parts = [part for part in STEP_PARTS if part != "all attention" or self.seconds[part]]
        return {part: self.seconds[part] / max(1, self.num_steps) for part in parts}

    def around(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The same call; its time belongs to the part, what was before it to "other"."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.lap("other")
            result = call(*args, **kwargs)
            self.lap(part)
            return result

        return timed


@contextmanager
def recorded_plans(llm: LLM) -> Iterator[list[StepPlan]]:
    """Yields a list that gets the plan of each step."""
    plans: list[StepPlan] = []

    def record(event: StepEvent) -> None:
        if event.result is None:
            plans.append(event.plan)

    with _told(llm, record):
        yield plans


@contextmanager
def _told(llm: LLM, observer: StepObserver) -> Iterator[None]:
    llm.engine.on_step.append(observer)
    try:
        yield
    finally:
        llm.engine.on_step.remove(observer)


@contextmanager
def timed_parts(llm: LLM) -> Iterator[StepClock]:
    """Yields a clock that runs with each step of an engine on the CPU, where one thing happens after the other.

    The clock itself costs about a microsecond a lap, some twenty laps a layer.
    """
    clock, executor = StepClock(), llm.engine.executor
    assert isinstance(executor, LocalExecutor)
    runner = executor.runner
    with ExitStack() as stack:
        stack.enter_context(_told(llm, clock.on_step))
        _replace(stack, runner, "recorded", None)  # a replay calls none of what is replaced below
        _replace(stack, runner.backend, "prepare", _timed_prepare(clock, runner.backend.prepare))
        _replace(stack, runner.backend, "write", clock.around(runner.backend.write, "KV write"))
        blocks = [block for layer in runner.decoder.layers for block in (layer.attention, layer.mlp)]
        for owner in (*blocks, runner.decoder):
            for name, part in list(vars(owner).items()):
                if isinstance(part, Linear):
                    _replace(stack, owner, name, clock.around(part, "linear"))
        yield clock


def _timed_prepare(
    clock: StepClock, prepare: Callable[[CascadePlan], PreparedAttention]
) -> Callable[[CascadePlan], PreparedAttention]:
    def timed(plan: CascadePlan) -> PreparedAttention:
        clock.lap("other")
        prepared = prepare(plan)
        clock.lap("planning")
        attend = prepared.attend
        told: list[str] = []

        def on_part(part: str, share: float) -> None:
            clock.lap(part, share)
            told.append(part)

        def timed_attend(layer: int, q: Any) -> Any:
            told.clear()
            clock.lap("other")
            result = attend(layer, q)
            if not plan.shared_levels:
                clock.lap("suffix attention")
            else:
                clock.lap("shared attention" if told else "all attention")
            return result

        if "attend" not in vars(prepared):  # else a backend hands out the same object again
            prepared.on_part = on_part
            prepared.attend = timed_attend  # type: ignore[method-assign]
        return prepared

    return timed


def _replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Give an object's attribute another value until the stack is left."""
    own = vars(owner)
    if name in own:
        stack.callback(setattr, owner, name, own[name])
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)
