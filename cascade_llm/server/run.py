"""The API process: listens, starts the engine process, and ends when it is told to or the engine is gone."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cascade_llm.errors import CascadeError, ConfigError, WorkerError
from cascade_llm.scheduler.sessions import SessionLimits
from cascade_llm.server.api import Api
from cascade_llm.server.app import build_application
from cascade_llm.server.engine_client import EngineClient
from cascade_llm.server.guard import RequestRecord
from cascade_llm.server.http_server import ConnectionLimits, HttpServer, most_connections
from cascade_llm.server.keys import KeyRing, read_keys
from cascade_llm.server.messages import EngineFacts
from cascade_llm.server.options import ServerOptions
from cascade_llm.server.tracing import Tracing, open_tracing

if TYPE_CHECKING:  # imports torch: beside the loop, once the engine process has started
    from cascade_llm.server.reading import RequestReader

__all__ = ["serve"]

log = logging.getLogger("cascade_llm.server")

LAST_ANSWERS_S = 2.0
"""After the end of a drain, for those who were told of it."""


def serve(
    model: str,
    engine_options: Mapping[str, Any],
    options: ServerOptions,
    on_listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a model until SIGTERM or SIGINT; then running requests have `drain_timeout` seconds.

    Args:
        model: see `LLM`
        engine_options: see `LLM`
        options: of the server
        on_listening: called with the server's URL; the model is loaded meanwhile

    Raises:
        ConfigError: nothing can listen there, or a file of keys cannot be read
        WorkerError: the engine process has ended, and is not to be started again
    """
    logging.getLogger("cascade_llm.advice").setLevel(logging.CRITICAL)  # it repeats parts of requests
    keys = read_keys(options)
    if not keys and not options.is_loopback:
        log.warning("%s is open to other machines, and no key is asked for: see --api-key", options.host)
    tracing = open_tracing(options.otlp_endpoint)
    with _listen(options) as listener:
        asyncio.run(_Server(model, engine_options, options, keys, tracing).run(listener, on_listening))


class _Server:
    """One server's life."""

    def __init__(
        self,
        model: str,
        engine_options: Mapping[str, Any],
        options: ServerOptions,
        keys: KeyRing,
        tracing: Tracing | None,
    ) -> None:
        self._tracing = tracing
        self._model, self._engine_options, self._options = model, engine_options, options
        self._engine = EngineClient(
            model,
            engine_options,
            restarts=options.restarts,
            on_end=self._stop,
            on_ready=self._load_reader,
            session_limits=SessionLimits(
                share=options.session_share, ttl_s=options.session_ttl, tenant_shares=keys.tenant_shares
            ),
        )
        self._api = Api(self._engine, options, keys)
        self._http = HttpServer(
            build_application(self._api, _ignore if tracing is None else tracing.write),
            ConnectionLimits(head_timeout_s=options.body_timeout, most=most_connections()),
            options.drain_timeout + LAST_ANSWERS_S,
        )
        self._loading: asyncio.Task[None] | None = None

    async def run(self, listener: socket.socket, on_listening: Callable[[str], None]) -> None:
        """Until a signal, or the engine's end."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain)
        self._engine.start()
        importing = asyncio.create_task(asyncio.to_thread(import_module, "cascade_llm.server.reading"))
        on_listening(_url(self._options.host, listener.getsockname()[1]))
        try:
            await self._http.serve(sockets=[listener])
            failure = self._engine.failure
        finally:
            await self._engine.close()
            await importing
            if self._tracing is not None:
                await asyncio.to_thread(self._tracing.close)
        if failure is not None:
            raise WorkerError(failure)

    def _drain(self) -> None:
        """Take no more requests; a second call waits for none."""
        self._http.force_exit = self._http.should_exit
        self._stop()
        log.info("draining: %d samples run or wait", self._engine.num_open_samples)
        asyncio.get_running_loop().call_later(
            self._options.drain_timeout, self._engine.answer_all, "the server is shutting down"
        )

    def _stop(self) -> None:
        self._http.should_exit = True
        self._api.close_feeds()

    def _load_reader(self, facts: EngineFacts) -> None:
        """The engine is ready: read the model's tokenizer too, beside the loop."""
        if self._api.reader is None:
            self._loading = asyncio.create_task(self._make_reader(facts))

    async def _make_reader(self, facts: EngineFacts) -> None:
        self._api.reader = await asyncio.to_thread(self._read_tokenizer, facts)
        log.info("ready: %s", ", ".join(self._api.names))

    def _read_tokenizer(self, facts: EngineFacts) -> RequestReader:
        from cascade_llm.engine.tokenizer import load_tokenizer
        from cascade_llm.loader.resolve import open_checkpoint
        from cascade_llm.server.reading import RequestReader

        revision = self._engine_options.get("revision")
        checkpoint = open_checkpoint(self._model, load_format="dummy", revision=revision)
        reader = RequestReader(load_tokenizer(checkpoint.tokenizer_source), facts, self._options)
        with suppress(CascadeError):  # the first conversation is not to wait for what only a first one needs
            reader.tokenize_chat([{"role": "user", "content": "Hello"}])
        return reader


def _ignore(record: RequestRecord, headers: Mapping[str, str], method: str, path: str, status: int) -> None:
    """Where no spans are asked for."""


def _listen(options: ServerOptions) -> socket.socket:
    try:
        family = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((options.host, options.port), family=family, backlog=2048)
    except OSError as error:
        where = f"{options.host}:{options.port}"
        raise ConfigError(f"nothing can listen on {where} ({error.strerror or error}): choose another --port") from None


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
