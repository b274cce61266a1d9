"""HTTP over sockets, which is uvicorn's work, and what a client may do with a connection beside its requests."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.guard import Application

__all__ = ["ConnectionLimits", "HttpServer", "most_connections"]

MOST_HEAD_BYTES = 64 << 10
"""Of the first line and the headers of a request."""
MOST_FILES = 1 << 16
"""That the process may have open, where the system allows so many; 1,024 is what many begin with."""
OWN_FILES = 128
"""Of these, for the engine process, the log and the like."""


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What connections may take."""

    head_timeout_s: float
    """From a connection's beginning, or the first byte after an answer, until a request's head is there."""
    most: int
    """Open at once."""


class HttpServer(uvicorn.Server):
    """uvicorn, which leaves signals to us."""

    def __init__(self, application: Application, limits: ConnectionLimits, drain_s: float) -> None:
        """Serve an application; after its end is asked for, connections have `drain_s` seconds."""
        super().__init__(
            uvicorn.Config(
                application,
                http=partial(LimitedProtocol, limits),  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=int(drain_s),
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def most_connections() -> int:
    """How many files are left for connections, once the process may open as many as it can be allowed to."""
    soft, hard = (MOST_FILES if given == resource.RLIM_INFINITY else given for given in _file_limits())
    wanted = min(hard, MOST_FILES)
    if soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, _file_limits()[1]))
            soft = wanted
    return max(1, soft - OWN_FILES)


def _file_limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's connection. By itself that waits for a head for ever, and takes one of any length."""

    def __init__(self, limits: ConnectionLimits, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._waiting: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._num_head_bytes = self._num_turns = 0
        self._refusal: ApiError | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Answer one too many at once."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.most:
            self._refuse(ApiError(503, f"{self._limits.most} connections are open: try again later"))
        else:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._wait_no_more()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parts of heads and bodies."""
        before = self._num_turns
        super().data_received(data)
        if before != self._num_turns:
            self._num_head_bytes = 0
        elif self._is_in_head:
            self._num_head_bytes += len(data)
        if self._num_head_bytes > MOST_HEAD_BYTES:
            self._refuse(_head_too_long())
        elif self._waiting is None and self.timeout_keep_alive_task is None and not self._is_answering:
            self._wait_for_head()  # also where a body goes on that was answered unread

    def on_headers_complete(self) -> None:
        """A head is there."""
        self._wait_no_more()
        self._num_turns += 1
        self._is_in_head = False
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MOST_HEAD_BYTES:
            self._refusal = _head_too_long()
            raise ValueError  # ends the parser, and calls `send_400_response`
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """A body is there: the next may be a head."""
        self._num_turns += 1
        self._is_in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so in the form of all errors."""
        self._refuse(self._refusal or ApiError(400, "what came is no HTTP: send HTTP/1.1, without TLS"))

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_head(self) -> None:
        if not self.transport.is_closing():
            self._waiting = self.loop.call_later(self._limits.head_timeout_s, self._time_is_over)

    def _wait_no_more(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _time_is_over(self) -> None:
        if self._num_head_bytes:
            self._refuse(ApiError(408, f"the headers did not come in {self._limits.head_timeout_s:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer, unless another answer is under way, and close."""
        if not self._is_answering and not self.transport.is_closing():
            body = error.body("")
            headers = {**error.headers, "content-type": "application/json", "content-length": str(len(body))}
            lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
            lines += [f"{name}: {value}" for name, value in {**headers, "connection": "close"}.items()]
            self.transport.write("\r\n".join((*lines, "", "")).encode() + body)
        self.transport.close()


def _head_too_long() -> ApiError:
    return ApiError(431, f"the headers are larger than {MOST_HEAD_BYTES} bytes: shorten them")
