"""The loop: plan, execute, commit, emit.

With a lag of 0 a step's result is committed before the next step is planned. With a lag of 1 the host plans step n + 1
while the device runs step n; its tokens are not known then, only their positions.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cascade_llm.engine.requests import RequestState
from cascade_llm.engine.tokenizer import Tokenizer
from cascade_llm.errors import GenerationError
from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.scheduler.scheduler import FlashInferScheduler, SequenceUpdate
from cascade_llm.scheduler.sequence import Request
from cascade_llm.worker.executor import Executor, PendingStep

__all__ = ["Engine", "StepEvent", "StepObserver"]


class StepEvent(NamedTuple):
    """What an observer is told of a step: once when it is planned, and once when its result is committed."""

    plan: StepPlan
    result: StepResult | None = None
    """None when the step has only been planned."""
    schedule_s: float = 0.0
    """Host time that planning took."""
    submit_s: float = 0.0
    """Host time until the executor had the step; on the CPU the step runs meanwhile."""
    wait_s: float = 0.0
    """Host time that the result was waited for."""
    commit_s: float = 0.0
    """Host time that the scheduler took for the result, and the text for its tokens."""


StepObserver = Callable[[StepEvent], None]
"""Called in the loop, between steps: it must be quick, and must not call the engine."""


@dataclass(slots=True)
class _InFlight:
    """A step in flight, and the host time that it has taken so far."""

    step: PendingStep
    schedule_s: float
    submit_s: float = 0.0


class Engine:
    """One scheduler and one executor, and the states of the requests that are on their way."""

    def __init__(
        self,
        scheduler: FlashInferScheduler,
        executor: Executor,
        tokenizer: Tokenizer | None,
        *,
        lag: int,
        on_step: Iterable[StepObserver] = (),
    ) -> None:
        """`lag`: steps that may be planned beyond the last committed one; `on_step`: who is told of each step."""
        self.scheduler, self.executor = scheduler, executor
        self.on_step = list(on_step)
        self._tokenizer, self._lag = tokenizer, lag
        self._in_flight: deque[_InFlight] = deque()
        self._states: dict[str, RequestState] = {}

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return self.scheduler.has_unfinished

    def add(self, request: Request, prompt: str | None = None) -> RequestState:
        """Queue a request; its state fills as steps are made."""
        state = RequestState(request, prompt, self._tokenizer)
        self._states[request.request_id] = state
        self.scheduler.add(request)
        return state

    def abort(self, request_id: str) -> None:
        """End a request now and free its pages; one that has ended is left alone."""
        self.scheduler.abort(request_id)
        state = self._states.pop(request_id, None)
        if state is not None:
            state.end("abort")

    def close(self) -> None:
        """End every request, and let go of the executor with its weights and pages."""
        for request_id in list(self._states):
            self.abort(request_id)
        self._in_flight.clear()
        self.executor.close()

    def step(self) -> list[RequestState]:
        """Plan a step and commit the oldest that is due; returns the requests that changed.

        A step that raises ends the requests in it with a `GenerationError`; the others go on.
        """
        try:
            if self._plan_next() and len(self._in_flight) <= self._lag:
                return []
            if not self._in_flight:
                return []
            oldest, started = self._in_flight[0], time.perf_counter()
            result = oldest.step.result()
        except BaseException as error:
            changed = self._fail(error)
            if not isinstance(error, Exception):
                raise
            return changed
        return self._commit(oldest, result, started)

    def _plan_next(self) -> bool:
        """Plan a step and hand it to the executor; False where none can be planned now."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is None:
            return False
        planned = time.perf_counter()
        step = _InFlight(PendingStep(plan, _not_submitted), planned - started)
        self._in_flight.append(step)
        self._tell(StepEvent(plan, schedule_s=step.schedule_s))
        submitted = time.perf_counter()
        step.step = self.executor.submit(plan)
        step.submit_s = time.perf_counter() - submitted
        return True

    def _commit(self, oldest: _InFlight, result: StepResult, wait_started: float) -> list[RequestState]:
        """Take in a result, hand out what it brings, and tell the observers."""
        waited, plan = time.perf_counter(), oldest.step.plan
        self._in_flight.popleft()
        changed = self._emit(self.scheduler.commit(plan, result), result)
        if self.on_step:
            commit_s = time.perf_counter() - waited
            self._tell(
                StepEvent(plan, result, oldest.schedule_s, oldest.submit_s, waited - wait_started, commit_s),
            )
        return changed

    def _tell(self, event: StepEvent) -> None:
        for observer in self.on_step:
            observer(event)

    def _fail(self, error: BaseException) -> list[RequestState]:
        """End what the steps in flight were for; without one in flight the scheduler itself is at fault."""
        if not self._in_flight:
            raise error
        plan = self._in_flight[0].step.plan
        self._in_flight.clear()
        updates = self.scheduler.fail(plan)
        reason = GenerationError(f"the step failed: {type(error).__name__}: {error}")
        reason.__cause__ = error
        return self._emit(updates, StepResult(step_id=plan.step_id), reason)

    def _emit(
        self, updates: list[SequenceUpdate], result: StepResult, failure: GenerationError | None = None
    ) -> list[RequestState]:
        changed: dict[str, RequestState] = {}
        for update in updates:
            state = self._states.get(update.request_id)
            if state is None:
                continue
            changed[update.request_id] = state
            stopped_by = state.apply(update)
            if stopped_by is not None and update.finish_reason is None:
                self.scheduler.finish(update.request_id, update.sample_index, "stop")
            if update.finish_reason == "error":
                state.end("error", failure or _not_finite(update, result.failure_detail))
                self.scheduler.abort(update.request_id)
        for request_id, state in changed.items():
            if state.output.finished:
                del self._states[request_id]
        return list(changed.values())


def _not_finite(update: SequenceUpdate, stage: str | None) -> GenerationError:
    where = f"first in: {stage}" if stage else "debug=True names the layer"
    return GenerationError(
        f"the logits of {update.request_id}, sample {update.sample_index}, are not finite ({where}): check the "
        "weights, or use dtype='float32'"
    )


def _not_submitted() -> StepResult:
    raise AssertionError("the step was never submitted")
