"""The engine's loop in a thread of its own: requests come and go from any thread, outputs wait for their readers.

The loop alone touches the engine. Others leave commands, which it carries out between two steps, and take outputs from
queues that never make it wait.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from cascade_llm.engine.engine import Engine
from cascade_llm.engine.output_queue import OutputQueue, RequestGain
from cascade_llm.engine.requests import RequestState
from cascade_llm.errors import EngineClosedError, WorkerError
from cascade_llm.scheduler.sequence import Request

__all__ = ["AsyncEngine", "OnReady"]

OnReady = Callable[[Sequence[OutputQueue]], None]
"""Called in the loop, at most once a step, with the queues that were empty and are not any more: it must be quick."""
Result = TypeVar("Result")


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    state: RequestState
    queue: OutputQueue
    only_whole: bool
    is_told: bool = False
    """Whether its first gain was handed over."""


class AsyncEngine:
    """Steps an `Engine` for as long as there is something to do.

    An error in one request ends that one. What ends the loop itself is told to every reader at once, and to every
    later caller.
    """

    def __init__(self, engine: Engine, on_ready: OnReady = lambda queues: None) -> None:
        """The engine is the loop's until `close`: nobody else may step it, or add to it."""
        self._engine, self._on_ready = engine, on_ready
        self._open: dict[str, _Open] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._failure: str | None = None
        self._doom: str | None = None
        self._is_closing = False
        self._turn_began_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="cascade-llm loop", daemon=True)
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """What ended the loop; None while it lives."""
        return self._failure

    @property
    def stalled_s(self) -> float:
        """Seconds since the step that is under way began; 0 where the loop waits for work."""
        began_s = self._turn_began_s
        return 0.0 if began_s is None else time.monotonic() - began_s

    def add(self, request: Request, *, only_whole: bool = False) -> OutputQueue:
        """Queue a request, whose id must be its own. Returns at once; the queue fills as steps are made.

        With `only_whole` nothing is handed over before the end. Raises `EngineClosedError` where the loop has ended.
        """
        queue = OutputQueue(request.request_id)
        self._command(lambda: self._add(request, queue, only_whole))
        return queue

    def abort(self, request_id: str) -> None:
        """End a request before the next step and free its pages; one that has ended is left alone."""
        self._command(lambda: self._abort(request_id))

    def call(self, function: Callable[[], Result]) -> Future[Result]:
        """Have the loop call a function between two steps, such as one that reads counters."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        self._command(run)
        return future

    def doom(self, reason: str) -> None:
        """End the loop, once it has come back from the step under way: what it needs is gone."""
        with self._wake:
            self._doom = reason
            self._wake.notify()

    def wait(self) -> None:
        """Return when the loop has ended, and everybody was told."""
        self._thread.join()

    def close(self) -> None:
        """End the loop, and with it what still runs. The engine itself stays open. A second call does nothing."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._failure is not None or self._is_closing:
                raise EngineClosedError(self._failure or "the engine is closed")
            self._commands.append(command)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            reason = "the engine was closed"
        except BaseException as error:  # whatever it is, those who wait must know
            reason = f"the engine's loop failed: {type(error).__name__}: {error}"
        self._end_all(reason)

    def _turn(self) -> bool:
        """Carry out what was left, then make a step where one is due; False at the end."""
        commands = self._next_commands()
        if commands is None:
            return False
        self._turn_began_s = time.monotonic()
        for command in commands:
            command()
        changed = self._engine.step() if self._engine.has_unfinished else []
        self._deliver(changed)
        if self._engine.num_requests != len(self._open):  # some ended outside of a step
            self._deliver([item.state for item in self._open.values() if item.state.output.finished])
        return True

    def _next_commands(self) -> list[Callable[[], None]] | None:
        """What was left since the last turn; waits where there is nothing to do at all. None at the end."""
        with self._wake:
            while not (self._commands or self._is_closing or self._doom or self._engine.has_unfinished):
                self._turn_began_s = None
                self._wake.wait()
            if self._is_closing:
                return None
            if self._doom is not None:
                raise WorkerError(self._doom)
            commands = list(self._commands)
            self._commands.clear()
            return commands

    def _add(self, request: Request, queue: OutputQueue, only_whole: bool) -> None:
        try:
            if request.request_id in self._open:
                raise ValueError("a request of this id is under way")
            state = self._engine.add(request)
        except Exception as error:
            reason = f"the request cannot be started: {type(error).__name__}: {error}"
            self._put([(queue, RequestGain(request.request_id, finished=True, error=reason))])
            return
        self._open[request.request_id] = _Open(state, queue, only_whole)

    def _abort(self, request_id: str) -> None:
        self._engine.abort(request_id)
        item = self._open.get(request_id)
        if item is not None:
            self._deliver([item.state])

    def _deliver(self, changed: Sequence[RequestState]) -> None:
        """Hand over what these requests gained."""
        gains = []
        for state in changed:
            item = self._open.get(state.request.request_id)
            if item is None or (item.only_whole and not state.output.finished):
                continue
            gain = _gain(item)
            if gain.finished:
                del self._open[gain.request_id]
            if gain.finished or gain.deltas:
                gains.append((item.queue, gain))
        self._put(gains)

    def _put(self, gains: Sequence[tuple[OutputQueue, RequestGain]]) -> None:
        ready = [queue for queue, gain in gains if queue.put(gain)]
        if ready:
            self._on_ready(ready)

    def _end_all(self, reason: str) -> None:
        """The loop is over: refuse what comes, carry out what was left, and tell everybody who waits."""
        with self._wake:
            self._failure, self._turn_began_s = reason, None
            commands = list(self._commands)
            self._commands.clear()
        for command in commands:
            try:  # requests that came too late are told as well; an engine in any state may refuse
                command()
            except Exception:
                continue
        waiting, self._open = list(self._open.values()), {}
        for item in waiting:
            self._engine.abandon(item.state.request.request_id)
        self._put([(i.queue, RequestGain(i.queue.request_id, finished=True, error=reason)) for i in waiting])


def _gain(item: _Open) -> RequestGain:
    output, deltas = item.state.output, item.state.take_deltas()
    gain = RequestGain(item.queue.request_id, deltas, output.num_cached_tokens, finished=output.finished)
    if output.finished:
        gain.metrics = output.metrics
    if output.error is not None:
        gain.error = str(output.error)
    if deltas and not item.is_told:
        gain.prompt_logprobs, item.is_told = output.prompt_logprobs, True
    return gain
