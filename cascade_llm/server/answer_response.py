"""Answers on their way to a client, who may be slow, or leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from fastapi import Response

from cascade_llm.engine.output_queue import RequestGain
from cascade_llm.server.answer_forms import AnswerForm
from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.engine_client import Answers, EngineClient, EngineStatus
from cascade_llm.server.guard import Receive, RequestRecord, Scope, Send
from cascade_llm.server.metrics import ServerMetrics
from cascade_llm.server.quotas import Lease
from cascade_llm.server.tracing import used_attributes

__all__ = ["STREAM_HEADERS", "AnswerResponse", "until_left"]

STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class AnswerResponse(Response):
    """Waits for requests that were submitted and writes what they gain; where the client leaves, they end."""

    def __init__(
        self,
        engine: EngineClient,
        answers: Answers,
        form: AnswerForm,
        metrics: ServerMetrics,
        record: RequestRecord,
        *,
        lease: Lease,
        is_streamed: bool,
        timeout_s: float | None,
    ) -> None:
        super().__init__()
        self._engine, self._answers, self._form = engine, answers, form
        self._metrics, self._record = metrics, record
        self._lease, self._is_streamed, self._timeout_s = lease, is_streamed, timeout_s
        self._last_s: dict[int, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the answer. Raises `ApiError` for one that failed before its first byte."""
        work = asyncio.create_task(self._stream(send) if self._is_streamed else self._write(send))
        leaving = asyncio.create_task(until_left(receive))
        try:
            done, _ = await asyncio.wait((work, leaving), timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if work in done:
                work.result()
            elif leaving in done:
                self._record.has_left = True
            else:
                await self._time_is_over(work, send)
        finally:
            self._engine.leave(self._answers)
            work.cancel()
            leaving.cancel()
            tally = self._form.tally
            self._lease.settle(tally.prompt_tokens + tally.completion_tokens)
            self._record.details |= {
                "prompt": tally.prompt_tokens,
                "cached": sum(tally.cached_tokens),
                "generated": tally.completion_tokens,
            }
            self._record.attributes |= used_attributes(tally)

    async def _write(self, send: Send) -> None:
        """The whole at once."""
        gains: dict[int, RequestGain] = {}
        async for batch in self._answers:
            for place, gain in batch:
                self._count(place, gain)
                gains[place] = gain  # whole: requests that are not streamed are told of once
        self._raise_failure(list(gains.values()))
        body = msgspec.json.encode(self._form.whole([gains[place] for place in sorted(gains)]))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send) -> None:
        """Piece by piece. A failure before the first is an answer of its own, one after it ends the stream."""
        has_begun = False
        async for batch in self._answers:
            if not has_begun:
                self._raise_failure([gain for _, gain in batch])
                await send({"type": "http.response.start", "status": 200, "headers": list(STREAM_HEADERS)})
                has_begun = True
            pieces: list[dict[str, Any]] = []
            for place, gain in batch:
                self._count(place, gain)
                pieces += self._form.pieces(place, gain)
            failure = next((gain.error for _, gain in batch if gain.error is not None), None)
            if failure is not None:
                pieces.append(self._form.failure(ApiError(500, failure, code="generation_failed")))
            if pieces:
                await send({"type": "http.response.body", "body": self._form.events(pieces), "more_body": True})
            if failure is not None:
                await send({"type": "http.response.body", "body": b""})
                return
        await send({"type": "http.response.body", "body": self._form.end()})

    def _raise_failure(self, gains: Sequence[RequestGain]) -> None:
        for gain in gains:
            if gain.error is not None:
                is_up = self._engine.status is EngineStatus.READY
                raise ApiError(
                    500 if is_up else 503, gain.error, code="generation_failed" if is_up else "engine_unavailable"
                )

    def _count(self, place: int, gain: RequestGain) -> None:
        """Tokens and times, for usage, metrics and log."""
        num_tokens, now_s = self._form.tally.add(place, gain), time.monotonic()
        if not num_tokens or not self._is_streamed:
            return
        last_s = self._last_s.get(place)
        if last_s is None:
            self._record.first_token_s = self._record.age_s
            self._metrics.first_token.observe(self._record.age_s)
            self._record.details.setdefault("first", f"{self._record.age_s:.3f}s")
        else:
            self._metrics.between_tokens.observe((now_s - last_s) / num_tokens)
        self._last_s[place] = now_s

    async def _time_is_over(self, work: asyncio.Task[None], send: Send) -> None:
        error = ApiError(504, f"the request was ended after {self._timeout_s:g} s", code="request_timeout")
        work.cancel()
        if self._record.status is None:
            raise error
        if self._is_streamed:
            await send(
                {
                    "type": "http.response.body",
                    "body": self._form.events([self._form.failure(error)]),
                    "more_body": False,
                }
            )


async def until_left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
