"""The process with the engine: commands come in, gains go out, the loop waits for neither."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing import connection, parent_process
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import zmq

from cascade_llm.engine.output_queue import OutputQueue
from cascade_llm.errors import EngineClosedError
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sequence import Request
from cascade_llm.scheduler.sessions import SessionLimits, SessionName
from cascade_llm.server.messages import (
    Abort,
    Answered,
    Ask,
    Close,
    EngineFacts,
    Failed,
    Gains,
    Ready,
    Report,
    Submit,
    decode_command,
    encode,
)
from cascade_llm.server.sharing_view import SharingView

if TYPE_CHECKING:  # heavy, and the API process imports this module to name `run_engine`
    from cascade_llm.engine.async_engine import AsyncEngine
    from cascade_llm.llm import LLM

__all__ = ["run_engine"]

MOST_PRIMITIVES = 256
"""Products that oneDNN keeps prepared, one for each shape of matrix and number of rows. Each takes 0.6 MB, and half a
millisecond to make; by itself oneDNN keeps 1,024 twice, and batches of a server have very many numbers of rows."""
PRIMITIVE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""oneDNN's own cache, and the one before it in torch; both are read when torch first multiplies."""
LINGER_MS = 2000
"""How long a last message is offered to an API process that does not take it."""
MOST_UNSENT = 16
"""Messages that the API process may leave untaken; what comes then is merged."""


def run_engine(
    command_address: str, report_address: str, model: str, options: Mapping[str, Any], session_limits: SessionLimits
) -> None:
    """The whole life of the process; it ends with the API process, whatever became of that.

    Args:
        command_address: where the API process sends commands from
        report_address: where it takes reports
        model: see `LLM`
        options: see `LLM`
        session_limits: what may stay between requests
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to both: the API process says when to end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for name in PRIMITIVE_CACHES:  # this process is ours alone, and has not multiplied yet
        os.environ.setdefault(name, str(MOST_PRIMITIVES))
    outbox = Outbox(report_address)
    try:
        from cascade_llm.engine.async_engine import AsyncEngine
        from cascade_llm.llm import LLM

        llm = LLM(model, **options)
        llm.engine.limit_sessions(session_limits)
    except BaseException as error:
        outbox.report(Failed(" ".join(str(error).split()) or type(error).__name__))
        outbox.close()
        os._exit(1)
    with llm:
        sharing = SharingView(llm)
        engine = AsyncEngine(llm.engine, outbox.announce)
        ending = threading.Thread(target=_end_with_loop, args=(engine, outbox), daemon=True)
        ending.start()
        threading.Thread(target=_end_with_ranks, args=(engine, llm.engine.executor.sentinels), daemon=True).start()
        outbox.report(Ready(EngineFacts.of(llm)))
        try:
            _take_commands(command_address, llm, engine, outbox, sharing)
        except EngineClosedError:  # the loop has failed, and the thread beside ends the process
            ending.join()
        engine.close()
    os._exit(0)  # at once: whoever waits was told, and daemon threads end with the process


class Outbox:
    """Sends reports from a thread of its own. One who does not take them makes nobody wait but that thread."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, MOST_UNSENT)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.connect(address)
        self._waiting: SimpleQueue[Report | Sequence[OutputQueue] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, name="cascade-llm outbox", daemon=True)
        self._thread.start()

    def report(self, report: Report) -> None:
        """Send this, in turn."""
        self._waiting.put(report)

    def announce(self, queues: Sequence[OutputQueue]) -> None:
        """Send what lies in these queues when their turn comes; see `OnReady`."""
        self._waiting.put(queues)

    def close(self) -> None:
        """Send what waits, and stop."""
        self._waiting.put(None)
        self._thread.join(LINGER_MS / 1000)

    def _send_all(self) -> None:
        while (item := self._waiting.get()) is not None:
            if isinstance(item, Sequence):
                gains = [gain for queue in item if (gain := queue.take()) is not None]
                self._socket.send(encode(Gains(gains)))
            else:
                self._socket.send(encode(item))
        self._socket.close()
        self._context.term()  # returns when all was taken, or LINGER_MS later


def _take_commands(address: str, llm: LLM, engine: AsyncEngine, outbox: Outbox, sharing: SharingView) -> None:
    """Hand on what the API process asks, until it says that this is all."""
    socket = zmq.Context().socket(zmq.PULL)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.connect(address)
    ending = frozenset(EngineFacts.of(llm).ending_token_ids)
    while True:
        match decode_command(socket.recv()):
            case Submit() as submit:
                engine.add(_request(submit, ending), only_whole=submit.only_whole)
            case Abort(request_ids):
                for request_id in request_ids:
                    engine.abort(request_id)
            case Ask(number, "health"):
                outbox.report(Answered(number, {"stalled_s": engine.stalled_s}))
            case Ask(number, "sessions", tenant):
                engine.call(partial(_tell_sessions, llm, outbox, number, tenant or ""))
            case Ask(number, "drop_session", tenant, session_id):
                engine.call(partial(_drop_session, llm, outbox, number, SessionName(tenant or "", session_id)))
            case Ask(number, "sharing" | "sharing_with_tokens" as what, tenant):
                with_tokens = what == "sharing_with_tokens"
                engine.call(partial(_describe, sharing, outbox, number, tenant, with_tokens=with_tokens))
            case Ask(number):
                engine.call(lambda number=number: outbox.report(Answered(number, _stats(llm))))  # type: ignore[misc]
            case Close():
                return


def _request(submit: Submit, ending: frozenset[int]) -> Request:
    return Request(
        request_id=submit.request_id,
        prompt_token_ids=submit.prompt_token_ids,
        params=SamplingParams(**submit.params),
        seed=submit.seed,
        priority=submit.priority,
        model_ending_token_ids=ending,
        session=submit.session,
        client=submit.client,
        cache_salt=submit.cache_salt,
    )


def _stats(llm: LLM) -> dict[str, Any]:
    return {**llm.stats(), **llm.plan_report(), "tenants": llm.engine.scheduler.tenant_pages}


def _tell_sessions(llm: LLM, outbox: Outbox, number: int, tenant: str) -> None:
    page_size, held = llm.options.page_size, llm.engine.scheduler.sessions
    sessions = [
        {
            "id": info.session_id,
            "object": "session",
            "held_pages": info.num_pages,
            "held_tokens": info.num_pages * page_size,
            "idle_s": round(info.idle_s, 3),
        }
        for info in llm.engine.sessions()
        if info.tenant == tenant
    ]
    value = {"data": sessions, "held_pages": held.num_pages_of(tenant), "budget_pages": held.budget}
    outbox.report(Answered(number, value))


def _drop_session(llm: LLM, outbox: Outbox, number: int, name: SessionName) -> None:
    outbox.report(Answered(number, {"dropped": llm.engine.drop_session(name)}))


def _describe(sharing: SharingView, outbox: Outbox, number: int, tenant: str | None, *, with_tokens: bool) -> None:
    outbox.report(Answered(number, sharing.describe(tenant, with_tokens=with_tokens)))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None, "started by the API process"
    connection.wait([parent.sentinel])
    os._exit(1)


def _end_with_loop(engine: AsyncEngine, outbox: Outbox) -> None:
    """A loop that failed ends the process, once everybody was told."""
    engine.wait()
    is_closed = engine.failure == "the engine was closed"
    if not is_closed:
        outbox.report(Failed(str(engine.failure)))
    outbox.close()
    os._exit(0 if is_closed else 1)


def _end_with_ranks(engine: AsyncEngine, sentinels: Sequence[int]) -> None:
    """A rank that has died ends the loop, also where nobody asks for a step."""
    if sentinels:
        connection.wait(sentinels)
        engine.doom("a process that runs steps has ended: where it was out of memory, lower kv_cache_bytes")
