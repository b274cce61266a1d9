"""The API process's end of the engine process: starts it, hands requests over, notices its death at once."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from enum import Enum
from multiprocessing.process import BaseProcess
from typing import Any

import zmq
import zmq.asyncio

from cascade_llm.engine.output_queue import OutputQueue, RequestGain
from cascade_llm.errors import EngineClosedError, WorkerError
from cascade_llm.scheduler.sequence import Request
from cascade_llm.scheduler.sessions import SessionLimits
from cascade_llm.server.engine_process import run_engine
from cascade_llm.server.messages import (
    Abort,
    Answered,
    Ask,
    Close,
    Command,
    EngineFacts,
    Failed,
    Gains,
    Ready,
    Report,
    Submit,
    decode_report,
    encode,
    given_params,
)

__all__ = ["Answers", "EngineClient", "EngineStatus"]

log = logging.getLogger("cascade_llm.server")

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
"""Before a restart; each is twice the one before."""
CLOSING_S = 10.0
"""What an engine process gets to end by itself."""
LAST_WORDS_MS = 100
"""What reports of a process that has ended are waited for."""


class EngineStatus(Enum):
    """What the engine process is doing."""

    STARTING = "starting"
    """The model is being loaded."""
    READY = "ready"
    DOWN = "down"
    """It has died and is not yet started again."""
    ENDED = "ended"
    """It will not be started again."""


class Answers:
    """What some requests that were handed over together gain; for one task to read."""

    def __init__(self, request_ids: Sequence[str]) -> None:
        self._queues = [OutputQueue(request_id) for request_id in request_ids]
        self._places = {request_id: place for place, request_id in enumerate(request_ids)}
        self._filled: list[int] = []
        self._wake = asyncio.Event()
        self._unfinished = set(request_ids)

    @property
    def unfinished(self) -> Sequence[str]:
        """Ids of the requests whose end has not come."""
        return list(self._unfinished)

    def put(self, gain: RequestGain) -> None:
        """Hand over what a request gained."""
        place = self._places[gain.request_id]
        if gain.finished:
            self._unfinished.discard(gain.request_id)
        if self._queues[place].put(gain):
            self._filled.append(place)
            self._wake.set()

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, RequestGain]]]:
        """Yield (place of the request, its gain), all that are there, until all have ended."""
        is_over = False
        while not is_over:
            await self._wake.wait()
            self._wake.clear()
            is_over = not self._unfinished
            filled, self._filled = self._filled, []
            taken = ((place, self._queues[place].take()) for place in filled)
            yield [(place, gain) for place, gain in taken if gain is not None]


class EngineClient:
    """One engine process at a time. Everything here runs in one asyncio loop."""

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        *,
        restarts: int = 0,
        on_end: Callable[[], None] = lambda: None,
        on_ready: Callable[[EngineFacts], None] = lambda facts: None,
        first_pause_s: float = FIRST_PAUSE_S,
        session_limits: SessionLimits | None = None,
    ) -> None:
        """Keep what the process is started with.

        Args:
            model: see `LLM`
            options: see `LLM`
            restarts: how often the process may be started again after it has died
            on_end: called when it has died and is not started again
            on_ready: called each time it has loaded the model
            first_pause_s: before the first restart
            session_limits: what may stay between requests
        """
        self._model, self._options = model, dict(options)
        self._restarts, self._pause_s = restarts, first_pause_s
        self._on_end, self._on_ready = on_end, on_ready
        self._session_limits = session_limits or SessionLimits()
        self._open: dict[str, tuple[Answers, int]] = {}
        self._questions: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._num_asked = 0
        self._commands: zmq.asyncio.Socket | None = None
        self._process: BaseProcess | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_closing = False
        self.status = EngineStatus.STARTING
        self.facts: EngineFacts | None = None
        """Known once it was ready."""
        self.failure: str | None = None
        """Why the process is not there; None while it is."""
        self.num_restarts = 0

    @property
    def num_open_samples(self) -> int:
        """Samples of the requests that have not ended."""
        return sum(num_samples for _, num_samples in self._open.values())

    @property
    def pid(self) -> int | None:
        """The process's number."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process and look after it; `status` says how far it is."""
        self._task = asyncio.create_task(self._look_after())

    def submit(self, requests: Sequence[Request], *, only_whole: bool) -> Answers:
        """Hand over requests. Raises `EngineClosedError` where there is no engine to take them."""
        if self.status is not EngineStatus.READY:
            raise EngineClosedError(self.failure or f"the engine is {self.status.value}: try again later")
        answers = Answers([request.request_id for request in requests])
        for request in requests:
            self._open[request.request_id] = (answers, request.params.n)
            self._send(
                Submit(
                    request.request_id,
                    list(request.prompt_token_ids),
                    dict(given_params(request.params)),
                    request.seed,
                    request.priority,
                    only_whole,
                    request.session,
                    request.client,
                    request.cache_salt,
                )
            )
        return answers

    def leave(self, answers: Answers) -> None:
        """Nobody reads these any more: end what has not ended."""
        unfinished = answers.unfinished
        for request_id in unfinished:
            self._open.pop(request_id, None)
        if unfinished and self.status is EngineStatus.READY:
            self._send(Abort(list(unfinished)))

    async def ask(
        self, what: str, timeout_s: float = 1.0, *, tenant: str | None = None, session_id: str = ""
    ) -> dict[str, Any]:
        """What an `Ask` is answered with. Raises `WorkerError` where no answer comes."""
        if self.status is not EngineStatus.READY:
            raise WorkerError(self.failure or f"the engine is {self.status.value}")
        self._num_asked += 1
        number = self._num_asked
        answer = self._questions[number] = asyncio.get_running_loop().create_future()
        self._send(Ask(number, what, tenant, session_id))
        try:
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            raise WorkerError(f"the engine has not answered in {timeout_s:g} s") from None
        finally:
            self._questions.pop(number, None)

    def answer_all(self, reason: str) -> None:
        """End every open request with an error."""
        for request_id, (answers, _) in list(self._open.items()):
            answers.put(RequestGain(request_id, finished=True, error=reason))
        self._open.clear()
        for question in self._questions.values():
            if not question.done():
                question.set_exception(WorkerError(reason))

    async def close(self) -> None:
        """End the process; what still runs ends with an error. A second call does nothing."""
        if self._task is None:
            return
        self._is_closing = True
        self.answer_all("the server is shutting down")
        if self._process is not None and self._commands is not None:
            self._send(Close())
        else:
            self._task.cancel()
        done, _ = await asyncio.wait([self._task], timeout=CLOSING_S)
        if not done and self._process is not None:
            self._process.kill()
            await asyncio.wait([self._task], timeout=CLOSING_S)
        self._task = None

    def _send(self, command: Command) -> None:
        assert self._commands is not None
        self._commands.send(encode(command))  # waits in the socket, whose queue has no end, until the process listens

    async def _look_after(self) -> None:
        while True:
            reason = await self._one_process()
            was_ready = self.status is EngineStatus.READY
            self.failure = reason
            is_last = self._is_closing or self.num_restarts >= self._restarts or (self.facts is None and not was_ready)
            self.status = EngineStatus.ENDED if is_last else EngineStatus.DOWN
            self.answer_all(reason)
            if self._is_closing:
                return
            if is_last:
                log.error("%s", reason)
                self._on_end()
                return
            log.error("%s; starting it again in %g s", reason, self._pause_s)
            await asyncio.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self.num_restarts += 1
            self.status = EngineStatus.STARTING

    async def _one_process(self) -> str:
        """The life of one process; returns what became of it."""
        folder = tempfile.mkdtemp(prefix="cascade-llm-")  # nobody else may enter it
        context = zmq.asyncio.Context()
        try:
            commands, reports = context.socket(zmq.PUSH), context.socket(zmq.PULL)
            commands.setsockopt(zmq.SNDHWM, 0)
            addresses = f"ipc://{folder}/commands", f"ipc://{folder}/reports"
            commands.bind(addresses[0])
            reports.bind(addresses[1])
            process = multiprocessing.get_context("spawn").Process(
                target=run_engine,
                args=(*addresses, self._model, self._options, self._session_limits),
                name="cascade-llm engine",
                daemon=not _has_ranks(self._options),  # a daemon may not start processes, and ends with us anyway
            )
            process.start()
            self._process, self._commands = process, commands
            try:
                return await self._until_death(process, reports)
            finally:
                self._commands = None
                if process.is_alive():
                    process.kill()
                process.join()
                self._process = None
        finally:
            context.destroy(linger=0)
            shutil.rmtree(folder, ignore_errors=True)

    async def _until_death(self, process: BaseProcess, reports: zmq.asyncio.Socket) -> str:
        loop, died = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(process.sentinel, died.set)
        dying = asyncio.create_task(died.wait())
        refused: list[str] = []
        try:
            while not died.is_set():
                receiving = asyncio.ensure_future(reports.recv())
                await asyncio.wait([receiving, dying], return_when=asyncio.FIRST_COMPLETED)
                if not receiving.done():
                    receiving.cancel()
                    break
                self._handle(decode_report(receiving.result()), refused)
            while await reports.poll(LAST_WORDS_MS):
                self._handle(decode_report(await reports.recv()), refused)
        finally:
            loop.remove_reader(process.sentinel)
            dying.cancel()
        process.join()
        return refused[0] if refused else f"the engine process has ended ({_how(process.exitcode)})"

    def _handle(self, report: Report, refused: list[str]) -> None:
        match report:
            case Gains(gains):
                for gain in gains:
                    self._hand_over(gain)
            case Ready(facts):
                self.facts, self.status, self.failure = facts, EngineStatus.READY, None
                self._on_ready(facts)
            case Answered(number, value):
                question = self._questions.get(number)
                if question is not None and not question.done():
                    question.set_result(value)
            case Failed(reason):
                refused.append(reason)

    def _hand_over(self, gain: RequestGain) -> None:
        if gain.request_id not in self._open:  # left meanwhile
            return
        answers, _ = self._open[gain.request_id]
        if gain.finished:
            del self._open[gain.request_id]
        answers.put(gain)


def _how(exit_code: int | None) -> str:
    return f"killed by signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit status {exit_code}"


def _has_ranks(options: Mapping[str, Any]) -> bool:
    """Whether an engine with these options, which nobody has checked yet, runs steps in processes of its own."""
    return options.get("tensor_parallel_size", 1) != 1 or options.get("distributed_executor_backend") == "mp"
