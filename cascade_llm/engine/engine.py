"""The loop: plan, execute, commit, emit.

With a lag of 0 a step's result is committed before the next step is planned. With a lag of 1 the host plans step n + 1
while the device runs step n; its tokens are not known then, only their positions.

A step that fails in the executor ends the requests in it. What is raised anywhere else, an interruption by Ctrl-C too,
may leave a call half done, and then nothing of the scheduler is believed: requests that only waited keep their place,
the others end with an error, and everything else begins anew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from cascade_llm.engine.requests import RequestState
from cascade_llm.engine.tokenizer import Tokenizer
from cascade_llm.errors import GenerationError
from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.scheduler.scheduler import FlashInferScheduler, SequenceUpdate
from cascade_llm.scheduler.sequence import Request
from cascade_llm.scheduler.sessions import SessionInfo, SessionLimits, SessionName
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
        self._abandoned: deque[str] = deque()
        self._is_half_done = False  # a call that changes state is under way, or was when something was raised

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return self.scheduler.has_unfinished

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._states)

    def add(self, request: Request, prompt: str | None = None) -> RequestState:
        """Queue a request; its state fills as steps are made."""
        state = RequestState(request, prompt, self._tokenizer, self.executor.facts.kv_bytes_per_token)
        with self._whole_call():
            self._states[request.request_id] = state
            self.scheduler.add(request)
        return state

    def abort(self, request_id: str) -> None:
        """End a request now and free its pages; one that has ended is left alone."""
        with self._whole_call():
            self._abort(request_id)

    def abandon(self, request_id: str) -> None:
        """Leave a note that nobody wants a request any more; the next call acts on it.

        For finalizers and signal handlers, which may run in the middle of any other call.
        """
        self._abandoned.append(request_id)

    def settle(self) -> None:
        """Act on what was left: notes of `abandon`, and a call that was interrupted."""
        with self._whole_call():
            pass

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix that no running request holds, and every session."""
        with self._whole_call():
            self.scheduler.reset_prefix_cache()

    def limit_sessions(self, limits: SessionLimits) -> None:
        """Set what may stay between requests; what is beyond it is given up."""
        with self._whole_call():
            self.scheduler.limit_sessions(limits)

    def sessions(self) -> list[SessionInfo]:
        """All sessions that hold pages, the least recently used first; those whose time is over end."""
        infos: list[SessionInfo] = []
        with self._whole_call():
            infos += self.scheduler.sessions.infos()
        return infos

    def drop_session(self, name: SessionName) -> bool:
        """Give a session up, that of turns which run too; returns whether there was anything."""
        found: list[bool] = []
        with self._whole_call():
            found.append(self.scheduler.drop_session(name))
        return any(found)

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
        with self._whole_call() as changed:
            changed += self._step()
        return changed

    @contextmanager
    def _whole_call(self) -> Iterator[list[RequestState]]:
        """Make a call that changes state whole: what it leaves half done is cleared away, at the latest by the next.

        Yields a list that gets the requests that changed.
        """
        changed: list[RequestState] = []
        if self._is_half_done:
            self._begin_anew(GenerationError("the engine was interrupted in the middle of a step"))
        self._is_half_done = True
        try:
            while self._abandoned:
                self._abort(self._abandoned[0])
                self._abandoned.popleft()
            yield changed
        except Exception as error:
            changed += self._begin_anew(_step_failed(error))
        self._is_half_done = False

    def _begin_anew(self, reason: GenerationError) -> list[RequestState]:
        """End every request but those that only waited; may itself be interrupted and called again."""
        self._is_half_done = True
        self._in_flight.clear()
        samples_to_come = self.scheduler.restart()
        ended = []
        for request_id, state in list(self._states.items()):
            if samples_to_come.get(request_id) != state.num_unfinished:
                self._end_with(state, reason)
                ended.append(state)
                self._states.pop(request_id, None)
        return ended

    def _abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        state = self._states.get(request_id)
        if state is not None:
            state.end("abort")
            self._states.pop(request_id)

    def _step(self) -> list[RequestState]:
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is not None:
            step = _InFlight(PendingStep(plan, _not_submitted), time.perf_counter() - started)
            self._in_flight.append(step)
            try:
                self._submit(step)
            except Exception as error:
                return self._fail(error)
            if len(self._in_flight) <= self._lag:
                return []
        if not self._in_flight:
            return []
        oldest, started = self._in_flight[0], time.perf_counter()
        try:
            result = oldest.step.result()
        except Exception as error:
            return self._fail(error)
        return self._commit(oldest, result, time.perf_counter() - started)

    def _submit(self, step: _InFlight) -> None:
        """Tell the observers of a planned step, and hand it to the executor."""
        self._tell(StepEvent(step.step.plan, schedule_s=step.schedule_s))
        started = time.perf_counter()
        step.step = self.executor.submit(step.step.plan)
        step.submit_s = time.perf_counter() - started

    def _commit(self, oldest: _InFlight, result: StepResult, wait_s: float) -> list[RequestState]:
        """Take in a result, hand out what it brings, and tell the observers."""
        started, plan = time.perf_counter(), oldest.step.plan
        self._in_flight.popleft()
        changed = self._emit(self.scheduler.commit(plan, result), result)
        commit_s = time.perf_counter() - started
        self._tell(StepEvent(plan, result, oldest.schedule_s, oldest.submit_s, wait_s, commit_s))
        return changed

    def _tell(self, event: StepEvent) -> None:
        for observer in self.on_step:
            observer(event)

    def _fail(self, error: Exception) -> list[RequestState]:
        """End what the steps in flight were for: the executor raised."""
        plan = self._in_flight[0].step.plan
        self._in_flight.clear()
        updates = self.scheduler.fail(plan)
        return self._emit(updates, StepResult(step_id=plan.step_id), _step_failed(error))

    def _emit(
        self, updates: list[SequenceUpdate], result: StepResult, failure: GenerationError | None = None
    ) -> list[RequestState]:
        changed: dict[str, RequestState] = {}
        for update in updates:
            state = self._states.get(update.request_id)
            if state is None or state.output.error is not None:  # a sibling's error has ended it
                continue
            changed[update.request_id] = state
            if update.finish_reason == "error":
                self._end_with(state, failure or update.failure or _not_finite(update, result.failure_detail))
                continue
            if state.output.outputs[update.sample_index].finish_reason is not None:  # drafted behind a stop string
                self.scheduler.counters.generated_tokens -= 1
                state.add_sharing(update.sharing)
                continue
            try:
                stopped_by = state.apply(update)
            except Exception as error:  # its own text, of which the others know nothing
                self._end_with(state, _step_failed(error))
                continue
            if stopped_by is not None and update.finish_reason is None:
                state.add_sharing(self.scheduler.finish(update.request_id, update.sample_index, "stop"))
        for request_id, state in changed.items():
            if state.output.finished:
                self._states.pop(request_id, None)
        return list(changed.values())

    def _end_with(self, state: RequestState, error: GenerationError) -> None:
        self.scheduler.abort(state.request.request_id)
        state.end("error", error)


def _step_failed(error: Exception) -> GenerationError:
    reason = GenerationError(f"the step failed: {type(error).__name__}: {error}")
    reason.__cause__ = error
    return reason


def _not_finite(update: SequenceUpdate, stage: str | None) -> GenerationError:
    where = f"first in: {stage}" if stage else "debug=True names the layer"
    return GenerationError(
        f"the logits of {update.request_id}, sample {update.sample_index}, are not finite ({where}): check the "
        "weights, or use dtype='float32' and kv_cache_dtype='float32' (pages of float16 hold no K or V beyond 65,504)"
    )


def _not_submitted() -> StepResult:
    raise AssertionError("the step was never submitted")
