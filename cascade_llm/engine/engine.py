"""The loop: plan, execute, commit, emit.

With a lag of 0 a step's result is committed before the next step is planned. With a lag of 1 the host plans step n + 1
while the device runs step n; its tokens are not known then, only their places.
"""

from __future__ import annotations

from collections import deque

from cascade_llm.engine.request_state import RequestState
from cascade_llm.engine.tokenizer import Tokenizer
from cascade_llm.errors import GenerationError
from cascade_llm.metrics import CascadeLog
from cascade_llm.plan import StepResult
from cascade_llm.plan_file.writer import PlanFileWriter
from cascade_llm.scheduler.scheduler import FlashInferScheduler, SequenceUpdate
from cascade_llm.scheduler.sequence import Request
from cascade_llm.worker.model_runner import ModelRunner, PendingStep

__all__ = ["Engine"]


class Engine:
    """One scheduler and one runner, and the states of the requests that are on their way."""

    def __init__(
        self,
        scheduler: FlashInferScheduler,
        runner: ModelRunner,
        tokenizer: Tokenizer | None,
        *,
        lag: int,
        recorder: PlanFileWriter | None = None,
    ) -> None:
        """`lag`: steps that may be planned beyond the last committed one; `recorder` is closed with the engine."""
        self.scheduler, self.runner = scheduler, runner
        self.cascade_log = CascadeLog()
        self._tokenizer, self._lag, self._recorder = tokenizer, lag, recorder
        self._pending: deque[PendingStep] = deque()
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
        """End every request, and let go of the runner with its weights and pages."""
        for request_id in list(self._states):
            self.abort(request_id)
        self._pending.clear()
        if self._recorder is not None:
            self._recorder.close()
        del self.runner

    def step(self) -> list[RequestState]:
        """Plan a step and commit the oldest that is due; returns the requests that changed.

        A step that raises ends the requests in it with a `GenerationError`; the others go on.
        """
        try:
            plan = self.scheduler.schedule()
            if plan is not None:
                self.cascade_log.note(plan.report)
                self._pending.append(PendingStep(plan, _not_submitted))
                if self._recorder is not None:
                    self._recorder.write_step(plan)
                self._pending[-1] = self.runner.submit(plan)
                if len(self._pending) <= self._lag:
                    return []
            if not self._pending:
                return []
            oldest = self._pending[0]
            result = oldest.result()
        except BaseException as error:
            changed = self._fail(error)
            if not isinstance(error, Exception):
                raise
            return changed
        self._pending.popleft()
        if self._recorder is not None:
            self._recorder.write_result(result)
        return self._emit(self.scheduler.commit(oldest.plan, result), result)

    def _fail(self, error: BaseException) -> list[RequestState]:
        """End what the steps in flight were for; without one in flight the scheduler itself is at fault."""
        if not self._pending:
            raise error
        plan = self._pending[0].plan
        self._pending.clear()
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
