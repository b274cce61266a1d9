"""What stands before the application: hosts, keys, bodies, request ids, the log's lines, errors that nobody foresaw."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any, Protocol

from cascade_llm.server.api_errors import ApiError, unforeseen
from cascade_llm.server.keys import KeyRing, Visitor
from cascade_llm.server.metrics import ServerMetrics

__all__ = ["ENDLESS_PATH", "OPEN_PATHS", "Guard", "OnEnd", "RequestRecord"]

log = logging.getLogger("cascade_llm.server")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class OnEnd(Protocol):
    """Called with what is known of a request, its headers, method, route and status."""

    def __call__(self, record: RequestRecord, headers: Mapping[str, str], method: str, path: str, status: int) -> None:
        """It is over."""


OPEN_PATHS = frozenset(("/health", "/ready"))
"""Asked without a key: they tell nothing but that."""
ENDLESS_PATH = "/v1/cascade/events"
"""Whose answer has no end, and so no HEAD."""
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
LEFT = 499
"""The status of a request whose client has left, as nginx writes it."""


class RequestRecord:
    """What is known of a request, for its line in the log; no text of it."""

    def __init__(self, request_id: str) -> None:
        self.request_id, self.arrived_s = request_id, time.monotonic()
        self.status: int | None = None
        self.has_left = False
        self.is_endless = False
        """Whether the client decides when it is over: how long that took says nothing."""
        self.details: dict[str, Any] = {}
        self.attributes: dict[str, Any] = {}
        """Of its span; empty where it generates nothing."""
        self.first_token_s: float | None = None
        """From its arrival on, where the answer is streamed."""
        self.visitor = Visitor()
        """Whose key was sent."""
        self.headers: dict[str, str] = {}
        """What the answer says beside its own."""

    @property
    def age_s(self) -> float:
        """Since it arrived."""
        return time.monotonic() - self.arrived_s


class Guard:
    """An ASGI application around another."""

    def __init__(
        self,
        application: Application,
        metrics: ServerMetrics,
        *,
        paths: Collection[str],
        open_paths: Collection[str],
        keys: KeyRing,
        allowed_hosts: Collection[str] | None,
        max_body_bytes: int,
        body_timeout_s: float,
        on_end: OnEnd,
    ) -> None:
        """Keep what requests are checked by.

        Args:
            application: the one inside
            metrics: counts requests
            paths: what metrics may be labelled with
            open_paths: asked without a key
            keys: who may ask
            allowed_hosts: names that the Host header may give; None allows any
            max_body_bytes: of a body
            body_timeout_s: for a body
            on_end: told of each request when it is over
        """
        self._application, self._metrics, self._paths = application, metrics, frozenset(paths)
        self._open_paths = frozenset(open_paths)
        self._keys, self._allowed_hosts = keys, allowed_hosts
        self._max_body_bytes, self._body_timeout_s, self._on_end = max_body_bytes, body_timeout_s, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        record = RequestRecord(given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["record"] = record

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                own = {"x-request-id": record.request_id, **record.headers}
                message["headers"] = [*message.get("headers", ()), *_encoded(own)]
            await send(message)

        try:
            self._check_host(headers)
            record.visitor = self._visitor(scope["path"], headers)
            body = await self._read_body(headers, receive)
            await self._application(_got(scope), _replaying(body, receive), send_named)
        except ApiError as error:
            await _answer(error, scope, record, send_named)
        except asyncio.CancelledError:
            record.has_left = True
            raise
        except Exception as error:
            log.error("%s failed: %s", record.request_id, _where(error))
            await _answer(unforeseen(), scope, record, send_named)
        finally:
            self._note(scope, record)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Refuse a page of another site whose name leads here (DNS rebinding): its requests name that site."""
        given = headers.get(b"host", b"").decode("latin-1")
        if self._allowed_hosts is None or not given:
            return
        name = given.rpartition(":")[0] if re.search(r":\d*$", given) else given
        if name.strip("[]").rstrip(".").lower() not in self._allowed_hosts:
            raise ApiError(
                421, f"the host {given!r:.80} is not served here: --allowed-hosts names more", code="host_not_allowed"
            )

    def _visitor(self, path: str, headers: dict[bytes, bytes]) -> Visitor:
        if not self._keys or path in self._open_paths:
            return Visitor()
        own = headers.get(b"x-api-key")  # as Anthropic's clients send it
        given = headers.get(b"authorization", b"") if own is None else b"bearer " + own
        scheme, _, key = given.partition(b" ")
        visitor = self._keys.find(key.strip().decode("latin-1"))
        if visitor is None or scheme.lower() != b"bearer":
            raise ApiError(
                401, "no key, or a wrong one: send Authorization: Bearer KEY, or x-api-key: KEY", code="invalid_api_key"
            )
        return visitor

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        told = headers.get(b"content-length", b"0")
        if told.isdigit() and int(told[:20]) > self._max_body_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size, is_over = 0, False
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while not is_over:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client has left")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_body_bytes:
                        raise self._too_large()
                    is_over = not message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"the body did not come in {self._body_timeout_s:g} s") from None
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._max_body_bytes} bytes: shorten it", code="body_too_large")

    def _note(self, scope: Scope, record: RequestRecord) -> None:
        status = LEFT if record.has_left or record.status is None else record.status
        path = scope["path"] if scope["path"] in self._paths else "other"
        self._metrics.requests.labels(path, str(status)).inc()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self._on_end(record, headers, scope["method"], path, status)
        if path in OPEN_PATHS:
            return
        if not record.is_endless:
            self._metrics.duration.observe(record.age_s)
        details = "".join(f" {name}={value}" for name, value in record.details.items())
        client = record.visitor.client.name
        details += f" key={client}" if client else ""
        log.info("%s %s %s %d %.3fs%s", record.request_id, scope["method"], path, status, record.age_s, details)


def _got(scope: Scope) -> Scope:
    """HEAD is answered as GET; the body is left out where it would be sent."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" and scope["path"] != ENDLESS_PATH else scope


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _replaying(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then what comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return waiting.pop() if waiting else await receive()

    return replay


async def _answer(error: ApiError, scope: Scope, record: RequestRecord, send: Send) -> None:
    """Answer with an error, unless an answer has begun: then nothing can be said."""
    if record.status is not None:
        return
    body = error.body(scope["path"])
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    await send({"type": "http.response.start", "status": error.status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": body})


def _where(error: BaseException) -> str:
    """The type of an error and its place; its message may repeat what a client sent."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return type(error).__name__ + "".join(f" < {frame.filename}:{frame.lineno}" for frame in reversed(frames))
