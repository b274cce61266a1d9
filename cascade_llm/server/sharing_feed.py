"""The live view's events: one task asks the engine for all who listen, and there is none where nobody does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec
from fastapi import Response

from cascade_llm.errors import WorkerError
from cascade_llm.server.answer_response import STREAM_HEADERS, until_left
from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.guard import Receive, Scope, Send

__all__ = ["SharingFeed", "SharingResponse"]

PAUSE_S = 0.25
"""Between two questions to the engine."""
QUIET_S = 15.0
"""A comment is sent after so long without an event, so that connections stay open."""
MOST_LISTENERS = 64

Listener = asyncio.Queue[bytes | None]


class SharingFeed:
    """Events for all listeners. One who reads slowly misses some, and makes nobody wait."""

    def __init__(self, ask: Callable[[], Awaitable[Mapping[str, Any]]]) -> None:
        """`ask`: gives what an event says; a `WorkerError` skips one."""
        self._ask = ask
        self._listeners: set[Listener] = set()
        self._asking: asyncio.Task[None] | None = None
        self._latest: bytes | None = None

    @property
    def num_listeners(self) -> int:
        """Who listens now."""
        return len(self._listeners)

    def listen(self) -> Listener:
        """A queue of the newest event, None at the end. Raises `ApiError` where too many listen."""
        if len(self._listeners) >= MOST_LISTENERS:
            raise ApiError(429, f"{MOST_LISTENERS} listen already: try again later", code="too_many_listeners")
        listener = Listener(1)
        self._listeners.add(listener)
        if self._asking is None:
            self._latest, self._asking = None, asyncio.create_task(self._ask_on())
        elif self._latest is not None:
            listener.put_nowait(self._latest)
        return listener

    def leave(self, listener: Listener) -> None:
        """Nobody reads this queue any more."""
        self._listeners.discard(listener)
        if not self._listeners and self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def close(self) -> None:
        """End all streams."""
        self._tell(None)

    async def _ask_on(self) -> None:
        while True:
            with suppress(WorkerError):
                event = b"event: sharing\ndata: " + msgspec.json.encode(await self._ask()) + b"\n\n"
                if event != self._latest:
                    self._latest = event
                    self._tell(event)
            await asyncio.sleep(PAUSE_S)

    def _tell(self, event: bytes | None) -> None:
        for listener in self._listeners:
            if listener.full():
                listener.get_nowait()
            listener.put_nowait(event)


class SharingResponse(Response):
    """Writes events until the client leaves, or the server ends."""

    def __init__(self, feed: SharingFeed) -> None:
        super().__init__()
        self._feed = feed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream. Raises `ApiError` where too many listen."""
        listener = self._feed.listen()
        scope["state"]["record"].is_endless = True
        work, leaving = asyncio.create_task(_write(listener, send)), asyncio.create_task(until_left(receive))
        try:
            await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._feed.leave(listener)
            work.cancel()
            leaving.cancel()


async def _write(listener: Listener, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})
    while True:
        event = await _next(listener)
        if event is None:
            break
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def _next(listener: Listener) -> bytes | None:
    """The next event, or a comment where none comes; None at the end."""
    try:
        return await asyncio.wait_for(listener.get(), QUIET_S)
    except TimeoutError:
        return b": nothing new\n\n"
