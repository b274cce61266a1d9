"""Ranks in processes of their own: plans go out and results come back by `plan_codec`.

    engine ─► ProcessExecutor ─► sending thread ─pipe─► rank: worker, one step after the other
                     ▲────────── receiving thread ◄─pipe──────┘

Threads stand between the engine and the pipes, so that an interruption of the engine never leaves half a message, and
a pipe that is full never makes both ends wait for each other. A rank ends when the pipe to the engine breaks. When a
rank ends, hangs, or fails in a step that it shares with others, all are ended, and whoever waits gets a `WorkerError`
that says which rank and how.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory

from cascade_llm.config import EngineOptions
from cascade_llm.errors import CascadeError, RankError, WorkerError
from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.plan_codec import decode_result
from cascade_llm.worker.executor import Executor, PendingStep
from cascade_llm.worker.rank_link import Message, RankLink, SharedEncoder
from cascade_llm.worker.rank_options import options_of_rank
from cascade_llm.worker.rank_process import (
    CLOSE,
    COUNT,
    COUNTERS,
    ENDED,
    FAILED,
    PING,
    READY,
    RESULT,
    STARTING,
    Failure,
    RankSetup,
)
from cascade_llm.worker.rank_watch import RankWatch
from cascade_llm.worker.start_progress import OnStart
from cascade_llm.worker.worker import WorkerFacts

__all__ = ["ProcessExecutor"]

MOST_IN_FLIGHT = 8
"""No engine plans so many steps ahead."""
JOIN_S = 10.0
"""How long ranks may take to end by themselves before they are killed."""
LOOK_S = 1.0
"""Between two looks at ranks that are waited for."""
CAUSE_S = 3.0
"""How long after one rank has lost another that one's own end is waited for."""


class ProcessExecutor(Executor):
    """Runs each step on every rank, and takes the result of rank 0."""

    def __init__(
        self, model: str | os.PathLike[str], options: EngineOptions, *, on_start: OnStart | None = None
    ) -> None:
        """Spawn `tensor_parallel_size` ranks, and wait until each has loaded its share of the model.

        Raises:
            CascadeError: what the start of a rank raised
            WorkerError: a rank ended while it started
        """
        self._inbox: SimpleQueue[Message] = SimpleQueue()
        self._results: dict[int, StepResult | CascadeError] = {}
        self._counters: dict[str, int] | None = None
        self._ended: WorkerError | None = None
        self._is_ready, self._timeout_s = False, options.rank_timeout_s
        self._folder = TemporaryDirectory(prefix="cascade-llm-")  # nobody else may enter it
        count = options.tensor_parallel_size
        setups = [
            RankSetup(
                model=model,
                options=options_of_rank(options, index),
                index=index,
                count=count,
                meeting_point=Path(self._folder.name) / "ranks",
            )
            for index in range(count)
        ]
        self._facts: list[WorkerFacts | None] = [None] * count
        self._encoder = SharedEncoder()
        self._ranks = [RankLink(setup, self._inbox) for setup in setups]
        try:
            self._wait_until(lambda: None not in self._facts, on_start)
        except BaseException:
            self.close()
            raise
        self._is_ready = True
        first = self._facts[0]
        assert first is not None
        assert all(facts is not None and facts.pool_pages == first.pool_pages for facts in self._facts)
        self.facts = first

    def submit(self, plan: StepPlan) -> PendingStep:
        """See `Executor`."""
        if self._ended is not None:
            raise self._ended
        for step_id in [known for known in self._results if known < plan.step_id - MOST_IN_FLIGHT]:
            del self._results[step_id]  # of steps that were dropped: nobody waits for them
        message = self._encoder.message(plan)
        for rank in self._ranks:
            rank.send(message)
        return PendingStep(plan, lambda: self._result(plan.step_id))

    @property
    def pids(self) -> list[int | None]:
        """The processes of the ranks, in order."""
        return [rank.pid for rank in self._ranks]

    @property
    def sentinels(self) -> Sequence[int]:
        """See `Executor`; of the ranks, in order."""
        return [rank.sentinel for rank in self._ranks]

    def counters(self) -> dict[str, int]:
        """See `Executor`; those of rank 0, the last known once it has ended."""
        if self._ended is None and self._ranks:
            self._counters = None
            self._ranks[0].send(COUNT)
            self._wait_until(lambda: self._counters is not None or self._ended is not None)
        return self._counters or {}

    def close(self) -> None:
        """See `Executor`: ask the ranks to end, and kill those that do not."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.send(CLOSE)
        deadline = time.monotonic() + JOIN_S
        for rank in ranks:
            rank.end(deadline)
        self._folder.cleanup()

    def _result(self, step_id: int) -> StepResult:
        self._wait_until(lambda: step_id in self._results or self._ended is not None, in_step=True)
        found = self._results.pop(step_id, self._ended)
        assert found is not None
        if isinstance(found, CascadeError):
            raise found
        return found

    def _wait_until(
        self, is_there: Callable[[], bool], on_start: OnStart | None = None, *, in_step: bool = False
    ) -> None:
        """Take messages until something is there; ranks that hang meanwhile are ended."""
        watch = RankWatch([rank.pulse for rank in self._ranks], self._timeout_s, in_step=in_step)
        while not is_there():
            try:
                message = self._inbox.get(timeout=min(LOOK_S, self._timeout_s))
            except Empty:
                if found := watch.look():
                    self._end(f"rank {found[0]} (process {self._ranks[found[0]].pid}) {found[1]}")
                for rank in self._ranks:
                    rank.send(PING)
            else:
                self._take(message, on_start)

    def _take(self, message: Message, on_start: OnStart | None) -> None:
        """Note what a rank says."""
        rank, kind, content = message
        if kind == RESULT:
            if rank == 0:
                result = decode_result(content)
                self._results[result.step_id] = result
        elif kind == COUNTERS:
            self._counters = pickle.loads(content)
        elif kind == READY:
            self._facts[rank] = pickle.loads(content)
        elif kind == STARTING:
            if on_start is not None and rank == 0:
                on_start(*pickle.loads(content))
        elif kind == FAILED:
            self._take_failure(rank, pickle.loads(content))
        else:
            self._end(f"rank {rank} {content.decode()}")

    def _take_failure(self, rank: int, failure: Failure) -> None:
        """A step that one rank alone runs may fail alone; ranks that share one would no longer exchange the same."""
        if len(self._ranks) > 1:
            self._end_all_for(rank, failure)
        elif failure.step_id is None:
            raise failure.error
        else:
            self._results[failure.step_id] = failure.error

    def _end_all_for(self, rank: int, failure: Failure) -> None:
        """A rank that lost another is not the cause: the other's own last word comes soon."""
        deadline = time.monotonic() + CAUSE_S
        while isinstance(failure.error, RankError) and (left_s := deadline - time.monotonic()) > 0:
            try:
                other, kind, content = self._inbox.get(timeout=left_s)
            except Empty:
                break
            if kind == ENDED:
                return self._end(f"rank {other} {content.decode()}")
            if kind == FAILED:
                rank, failure = other, pickle.loads(content)
        if failure.step_id is None:
            raise type(failure.error)(f"rank {rank}: {failure.error}")
        return self._end(f"rank {rank} failed in step {failure.step_id}: {failure.error}")

    def _end(self, how: str) -> None:
        """There is a rank that cannot go on, and so none can: kill them, and tell everybody who waits."""
        if self._ended is None:
            self._ended = WorkerError(how + self._cure())
        for rank in self._ranks:
            rank.kill()
        if not self._is_ready:
            raise self._ended

    def _cure(self) -> str:
        if self._is_ready:
            return ": create another LLM; where it was out of memory, lower kv_cache_bytes or max_num_batched_tokens"
        return (
            " while it started: its own output says why; a script that creates an LLM with processes has to do so "
            'below `if __name__ == "__main__":`'
        )
