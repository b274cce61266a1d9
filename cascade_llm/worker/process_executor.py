"""Ranks in processes of their own: plans go out and results come back by `plan_codec`.

    engine ─► ProcessExecutor ─► sending thread ─pipe─► rank: worker, one step after the other
                     ▲────────── receiving thread ◄─pipe──────┘

Threads stand between the engine and the pipes, so that an interruption of the engine never leaves half a message, and
a pipe that is full never makes both ends wait for each other. A rank ends when the pipe to the engine breaks; when a
rank ends, whoever waits gets a `WorkerError` that says which and how.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from cascade_llm.config import EngineOptions
from cascade_llm.errors import CascadeError, WorkerError
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.plan_codec import PlanDecoder, PlanEncoder, decode_result, encode_result
from cascade_llm.worker.executor import Executor, PendingStep
from cascade_llm.worker.model_runner import ModelRunner
from cascade_llm.worker.start_progress import OnStart
from cascade_llm.worker.worker import WorkerFacts, build_worker

__all__ = ["ProcessExecutor"]

MOST_IN_FLIGHT = 8
"""No engine plans so many steps ahead."""
JOIN_S = 10.0
"""How long a rank may take to end by itself before it is killed."""

PLAN, COUNT, CLOSE = b"P", b"N", b"X"
"""What a message to a rank begins with."""
READY, STARTING, RESULT, COUNTERS, FAILED, ENDED = b"Y", b"C", b"R", b"N", b"F", b"E"
"""What a message from a rank begins with; `ENDED` is never sent: the receiving thread makes it."""


class _Message(NamedTuple):
    """What came of a rank."""

    rank: int
    kind: bytes
    content: bytes


@dataclass(frozen=True)
class _Failure:
    """What was raised in a rank: for a step, or at start (`step_id` -1)."""

    step_id: int
    error: CascadeError


class ProcessExecutor(Executor):
    """Runs each step on every rank, and takes the result of rank 0."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        options: EngineOptions,
        *,
        num_ranks: int = 1,
        on_start: OnStart | None = None,
    ) -> None:
        """Spawn the ranks and wait until each has loaded its model.

        Raises:
            CascadeError: what the start of a rank raised
            WorkerError: a rank ended while it started
        """
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._results: dict[int, StepResult | CascadeError] = {}
        self._counters: dict[str, int] | None = None
        self._ended: WorkerError | None = None
        self._is_ready = False
        self._facts: list[WorkerFacts | None] = [None] * num_ranks
        self._ranks = [_Rank(index, model, options, self._inbox) for index in range(num_ranks)]
        try:
            while None in self._facts:
                self._take(on_start)
        except BaseException:
            self.close()
            raise
        self._is_ready = True
        first = self._facts[0]
        assert first is not None
        self.facts = first

    def submit(self, plan: StepPlan) -> PendingStep:
        """See `Executor`."""
        if self._ended is not None:
            raise self._ended
        for step_id in [known for known in self._results if known < plan.step_id - MOST_IN_FLIGHT]:
            del self._results[step_id]  # of steps that were dropped: nobody waits for them
        for rank in self._ranks:
            rank.send(PLAN, plan)
        return PendingStep(plan, lambda: self._result(plan.step_id))

    @property
    def pids(self) -> list[int | None]:
        """The processes of the ranks, in order."""
        return [rank.pid for rank in self._ranks]

    def counters(self) -> dict[str, int]:
        """See `Executor`; those of rank 0, the last known once it has ended."""
        if self._ended is None and self._ranks:
            self._counters = None
            self._ranks[0].send(COUNT)
            while self._counters is None and self._ended is None:
                self._take()
        return self._counters or {}

    def close(self) -> None:
        """See `Executor`: ask the ranks to end, and kill those that do not."""
        ranks, self._ranks = self._ranks, []
        for rank in ranks:
            rank.send(CLOSE)
        for rank in ranks:
            rank.end()

    def _result(self, step_id: int) -> StepResult:
        while step_id not in self._results:
            if self._ended is not None:
                raise self._ended
            self._take()
        found = self._results.pop(step_id)
        if isinstance(found, CascadeError):
            raise found
        return found

    def _take(self, on_start: OnStart | None = None) -> None:
        """Wait for a message and note what it says."""
        rank, kind, content = self._inbox.get()
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
            failure: _Failure = pickle.loads(content)
            if failure.step_id < 0:
                raise failure.error
            self._results[failure.step_id] = failure.error
        else:
            self._ended = WorkerError(f"rank {rank} {content.decode()}{self._cure()}")
            if not self._is_ready:
                raise self._ended

    def _cure(self) -> str:
        if self._is_ready:
            return ": create another LLM; where it was out of memory, lower kv_cache_bytes or max_num_batched_tokens"
        return (
            " while it started: its own output says why; a script that creates an LLM with processes has to do so "
            'below `if __name__ == "__main__":`'
        )


class _Rank:
    """The engine's end of one rank."""

    def __init__(
        self, index: int, model: str | os.PathLike[str], options: EngineOptions, inbox: SimpleQueue[_Message]
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_run_rank, args=(theirs, model, options), name=f"cascade-llm rank {index}", daemon=True
        )
        self._process.start()
        theirs.close()
        self._outbox: SimpleQueue[tuple[bytes, StepPlan | None]] = SimpleQueue()
        self._receiving = threading.Thread(target=self._receive, args=(index, inbox), daemon=True)
        self._receiving.start()
        threading.Thread(target=self._send_all, args=(index, inbox), daemon=True).start()

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    def send(self, kind: bytes, plan: StepPlan | None = None) -> None:
        """Queue a message; a rank that has ended gets it no more."""
        self._outbox.put((kind, plan))

    def end(self) -> None:
        """Wait for the process, which was told to close; kill it where it does not."""
        self._process.join(JOIN_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._receiving.join()

    def _send_all(self, index: int, inbox: SimpleQueue[_Message]) -> None:
        encoder = PlanEncoder()
        while True:
            kind, plan = self._outbox.get()
            try:
                self._connection.send_bytes(kind if plan is None else kind + encoder.encode(plan))
            except OSError:  # the rank has ended: the receiving thread tells
                return
            except Exception as error:
                inbox.put(_Message(index, ENDED, f"cannot be sent a plan ({type(error).__name__}: {error})".encode()))
                return
            if kind == CLOSE:
                return

    def _receive(self, index: int, inbox: SimpleQueue[_Message]) -> None:
        while True:
            wait([self._connection, self._process.sentinel])
            try:
                if not self._connection.poll():
                    break
                message = self._connection.recv_bytes()
            except (EOFError, OSError):
                break
            inbox.put(_Message(index, message[:1], message[1:]))
        self._process.join()
        inbox.put(_Message(index, ENDED, _how_it_ended(self._process).encode()))


def _how_it_ended(process: BaseProcess) -> str:
    code = process.exitcode or 0
    try:
        how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with status {code}"
    except ValueError:
        how = f"by signal {-code}"
    return f"(process {process.pid}) ended {how}"


# -- in the rank's own process ----------------------------------------------------------------------------------------


def _run_rank(connection: Connection, model: str | os.PathLike[str], options: EngineOptions) -> None:
    """The life of a rank: load, then run plans until it is told to close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the engine decides what ends

    def tell(kind: bytes, content: Any) -> None:
        connection.send_bytes(kind + pickle.dumps(content))

    try:
        checkpoint = open_checkpoint(model, load_format=options.load_format, revision=options.revision)
        runner, facts = build_worker(options, checkpoint, on_start=lambda *progress: tell(STARTING, progress))
    except Exception as error:
        tell(FAILED, _Failure(-1, _as_ours(error)))
        return
    tell(READY, facts)
    plans: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read_plans, args=(connection, plans), daemon=True).start()
    _Loop(connection, runner).run(plans)


def _read_plans(connection: Connection, plans: SimpleQueue[bytes]) -> None:
    """Bring messages in as they come; without an engine there is nothing left to do, not even the step under way."""
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)
        plans.put(message)
        if message == CLOSE:
            return


class _Loop:
    """Runs plans in order; a plan that has come is started before the result of the one before is waited for."""

    def __init__(self, connection: Connection, runner: ModelRunner) -> None:
        self._connection, self._runner = connection, runner
        self._decoder = PlanDecoder()
        self._pending: deque[tuple[int, Callable[[], StepResult]]] = deque()

    def run(self, messages: SimpleQueue[bytes]) -> None:
        """Until `CLOSE` comes."""
        while True:
            try:
                message = messages.get(block=not self._pending)
            except Empty:
                self._finish_oldest()
                continue
            if message == CLOSE:
                return
            if message == COUNT:
                graphs = self._runner.graphs
                counts = graphs.counters.as_dict() if graphs is not None else {}
                self._connection.send_bytes(COUNTERS + pickle.dumps(counts))
            else:
                self._start(message[1:])
            while len(self._pending) > 1:
                self._finish_oldest()

    def _start(self, encoded: bytes) -> None:
        plan = self._decoder.decode(encoded)
        try:
            self._pending.append((plan.step_id, self._runner.submit(plan)))
        except Exception as error:
            self._fail(plan.step_id, error)

    def _finish_oldest(self) -> None:
        step_id, result = self._pending.popleft()
        try:
            self._connection.send_bytes(RESULT + encode_result(result()))
        except Exception as error:
            self._fail(step_id, error)

    def _fail(self, step_id: int, error: Exception) -> None:
        self._connection.send_bytes(FAILED + pickle.dumps(_Failure(step_id, _as_ours(error))))


def _as_ours(error: Exception) -> CascadeError:
    """The error, or one of ours that says what it was: a foreign class may be unknown in the other process."""
    return error if isinstance(error, CascadeError) else WorkerError(f"{type(error).__name__}: {error}")
