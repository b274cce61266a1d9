"""The engine's end of one rank: its process, and the threads that stand between the engine and the pipe."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from queue import SimpleQueue
from typing import NamedTuple

from cascade_llm.plan import StepPlan
from cascade_llm.plan_codec import PlanEncoder
from cascade_llm.worker.rank_process import CLOSE, ENDED, PLAN, PONG, RankSetup, run_rank
from cascade_llm.worker.rank_watch import Pulse

__all__ = ["Message", "RankLink", "SharedEncoder"]

Outgoing = bytes | Callable[[], bytes]
"""A message, or what makes it."""


class Message(NamedTuple):
    """What came of a rank."""

    rank: int
    kind: bytes
    content: bytes


class SharedEncoder:
    """Encodes each plan once for all ranks, in the thread that sends it first.

    Every thread sends the same messages in the same order, so the plans before one are encoded before it.
    """

    def __init__(self) -> None:
        self._encoder = PlanEncoder()
        self._lock = threading.Lock()

    def message(self, plan: StepPlan) -> Callable[[], bytes]:
        """What makes the message; its first call encodes the plan."""
        made: list[bytes] = []

        def make() -> bytes:
            with self._lock:
                if not made:
                    made.append(PLAN + self._encoder.encode(plan))
            return made[0]

        return make


class RankLink:
    """Starts a rank, sends to it, and puts what it says into the inbox."""

    def __init__(self, setup: RankSetup, inbox: SimpleQueue[Message]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._index = setup.index
        self._process: BaseProcess = context.Process(
            target=run_rank, args=(theirs, setup), name=f"cascade-llm rank {setup.index}", daemon=True
        )
        self._process.start()
        theirs.close()
        self.pulse = Pulse()
        self._outbox: SimpleQueue[Outgoing] = SimpleQueue()
        self._receiving = threading.Thread(target=self._receive, args=(inbox,), daemon=True)
        self._receiving.start()
        threading.Thread(target=self._send_all, args=(inbox,), daemon=True).start()

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """Becomes ready when the process has ended."""
        return self._process.sentinel

    def send(self, message: Outgoing) -> None:
        """Queue a message; a rank that has ended gets it no more."""
        self._outbox.put(message)

    def kill(self) -> None:
        """End the process at once; whoever reads the inbox hears of it."""
        self._process.kill()

    def end(self, deadline: float) -> None:
        """Wait for the process, which was told to close, until a `time.monotonic` time; kill it where it does not."""
        self._process.join(max(0.0, deadline - time.monotonic()))
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._receiving.join()

    def _send_all(self, inbox: SimpleQueue[Message]) -> None:
        while True:
            outgoing = self._outbox.get()
            try:
                self._connection.send_bytes(outgoing if isinstance(outgoing, bytes) else outgoing())
            except OSError:  # the rank has ended: the receiving thread tells
                return
            except Exception as error:
                how = f"cannot be sent a plan ({type(error).__name__}: {error})"
                inbox.put(Message(self._index, ENDED, how.encode()))
                return
            if outgoing == CLOSE:
                return

    def _receive(self, inbox: SimpleQueue[Message]) -> None:
        while True:
            wait([self._connection, self._process.sentinel])
            try:
                if not self._connection.poll():
                    break
                message = self._connection.recv_bytes()
            except (EOFError, OSError):
                break
            if message[:1] == PONG:
                self.pulse.num_exchanges = int(message[1:])
            else:
                inbox.put(Message(self._index, message[:1], message[1:]))
            self.pulse.heard_at = time.monotonic()
        self._process.join()
        inbox.put(Message(self._index, ENDED, _how_it_ended(self._process).encode()))


def _how_it_ended(process: BaseProcess) -> str:
    code = process.exitcode or 0
    try:
        how = f"by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"with status {code}"
    except ValueError:
        how = f"by signal {-code}"
    return f"(process {process.pid}) ended {how}"
