"""A rank in a process of its own: what it is started with, what it says and hears, and its life.

Messages are bytes on a pipe: a letter, then a plan or result by `plan_codec`, or a pickle of one of our records.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from cascade_llm import __version__
from cascade_llm.config import EngineOptions
from cascade_llm.device.devices import resolve_device
from cascade_llm.device.ranks import Ranks, join_ranks
from cascade_llm.errors import CascadeError, RankError, WorkerError
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.plan import StepResult
from cascade_llm.plan_codec import PlanDecoder, encode_result
from cascade_llm.worker.model_runner import ModelRunner
from cascade_llm.worker.worker import build_worker

__all__ = ["Failure", "RankSetup", "run_rank"]

PLAN, COUNT, PING, CLOSE = b"P", b"N", b"?", b"X"
"""What a message to a rank begins with."""
READY, STARTING, RESULT, COUNTERS, PONG, FAILED, ENDED = b"Y", b"C", b"R", b"N", b"!", b"F", b"E"
"""What a message from a rank begins with; `ENDED` is never sent: the receiving thread makes it."""


@dataclass(frozen=True, kw_only=True)
class RankSetup:
    """What a rank is started with."""

    model: str | os.PathLike[str]
    options: EngineOptions
    """Of this rank: its device and its threads."""
    index: int
    count: int
    meeting_point: Path
    """Where the ranks find each other, see `join_ranks`."""
    version: str = __version__
    """Of the engine that starts it."""


@dataclass(frozen=True)
class Failure:
    """What was raised in a rank: for a step, or at start (`step_id` None)."""

    step_id: int | None
    error: CascadeError


def run_rank(connection: Connection, setup: RankSetup) -> None:
    """The life of a rank: load, then run plans until it is told to close."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the engine decides what ends
    line, plans = _Line(connection), SimpleQueue[bytes]()
    threading.Thread(target=_read_messages, args=(line, plans), daemon=True).start()
    try:
        if setup.version != __version__:
            raise WorkerError(
                f"the engine is cascade-llm {setup.version}, this rank runs {__version__}: the package was changed "
                "while the engine ran, start it again"
            )
        device = resolve_device(setup.options.device)
        ranks = line.ranks = join_ranks(setup.index, setup.count, setup.meeting_point, device)
        checkpoint = open_checkpoint(
            setup.model, load_format=setup.options.load_format, revision=setup.options.revision
        )
        runner, facts = build_worker(
            setup.options, checkpoint, ranks=ranks, on_start=lambda *progress: line.tell(STARTING, progress)
        )
    except Exception as error:
        line.tell(FAILED, Failure(None, _as_ours(error)))
        line.ranks.close()  # who waits for this rank hears that it has left
        return
    line.tell(READY, facts)
    _Loop(line, runner).run(plans)
    with suppress(RankError):  # another has left already
        ranks.least(0, device)  # a connection that closes would break what another rank is still reading
    ranks.close()


class _Line:
    """The rank's end of the pipe, for two threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.ranks = Ranks()
        """As soon as this rank has met the others."""
        self._lock = threading.Lock()

    def send(self, message: bytes) -> None:
        """A message as it is."""
        with self._lock:
            self.connection.send_bytes(message)

    def tell(self, kind: bytes, content: Any) -> None:
        """A record."""
        self.send(kind + pickle.dumps(content))


def _read_messages(line: _Line, plans: SimpleQueue[bytes]) -> None:
    """Bring messages in as they come, and answer whether this rank still lives.

    Without an engine there is nothing left to do, not even the step under way.
    """
    while True:
        try:
            message = line.connection.recv_bytes()
            if message == PING:
                line.send(PONG + str(line.ranks.num_exchanges).encode())
                continue
        except (EOFError, OSError):
            os._exit(1)
        plans.put(message)
        if message == CLOSE:
            return


class _Loop:
    """Runs plans in order; a plan that has come is started before the result of the one before is waited for."""

    def __init__(self, line: _Line, runner: ModelRunner) -> None:
        self._line, self._runner = line, runner
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
                self._line.tell(COUNTERS, graphs.counters.as_dict() if graphs is not None else {})
            else:
                self._start(message[1:])
            while len(self._pending) > 1:
                self._finish_oldest()

    def _start(self, encoded: bytes) -> None:
        plan = self._decoder.decode(encoded)
        try:
            self._pending.append((plan.step_id, self._runner.submit(plan)))
        except Exception as error:
            self._line.tell(FAILED, Failure(plan.step_id, _as_ours(error)))

    def _finish_oldest(self) -> None:
        step_id, result = self._pending.popleft()
        try:
            self._line.send(RESULT + encode_result(result()))
        except Exception as error:
            self._line.tell(FAILED, Failure(step_id, _as_ours(error)))


def _as_ours(error: Exception) -> CascadeError:
    """The error, or one of ours that says what it was: a foreign class may be unknown in the other process."""
    return error if isinstance(error, CascadeError) else WorkerError(f"{type(error).__name__}: {error}")
