"""A client that measures any server which speaks OpenAI's completions protocol: streams, timed as their events come.

One thread and one connection per request that is under way. An event counts as one token where the server does not say
how many its text is; the totals come from the server's own `usage` where it tells.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cascade_llm.bench.load import Load, LoadRequest
from cascade_llm.bench.online import Arrivals, RequestTiming
from cascade_llm.errors import BackendError, ConfigError

__all__ = ["CompletionsServer", "ServeRun", "StreamedAnswer", "run_against_server"]

MAX_CONNECTIONS = 1024


@dataclass(frozen=True)
class StreamedAnswer:
    """One request's stream."""

    timing: RequestTiming
    num_generated: int
    error: str | None = None
    """Why it ended early; None where it ended well."""


@dataclass(frozen=True)
class ServeRun:
    """A whole run; requests that failed are counted and left out of the times."""

    elapsed_s: float
    answers: list[StreamedAnswer]

    @property
    def succeeded(self) -> list[StreamedAnswer]:
        """Those that ended well."""
        return [answer for answer in self.answers if answer.error is None]

    @property
    def errors(self) -> list[str]:
        """Why the others did not."""
        return [answer.error for answer in self.answers if answer.error is not None]


class CompletionsServer:
    """Where a server is, and how to ask it."""

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0
    ) -> None:
        """Ask the server for its models.

        Args:
            url: such as http://localhost:8000, with or without /v1
            model: one of the server's; default the first
            api_key: sent as a bearer token
            timeout_s: without a byte from the server

        Raises:
            ConfigError: no URL
            BackendError: nothing answers there, or it has not that model
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no URL of a server: write it as http://localhost:8000")
        self._https, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._timeout_s = timeout_s
        self.url = url
        known = self._models()
        self.model = model or (known[0] if known else "")
        if known and self.model not in known:
            raise BackendError(f"{url} has no model {self.model!r}: it serves {', '.join(known)}")

    def complete(
        self, request: LoadRequest, sampling: Mapping[str, Any], timing: RequestTiming, now_s: Callable[[], float]
    ) -> StreamedAnswer:
        """Stream one request's answer; whatever goes wrong is in the answer, not raised."""
        body = {
            "model": self.model,
            "prompt": list(request.token_ids),
            "max_tokens": request.output_len,
            "n": request.n,
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling,
        }
        timing.token_times_s = [[] for _ in range(request.n)]
        told: int | None = None
        try:
            for event in self._events(body):
                at_s = now_s()
                if "error" in event:
                    return StreamedAnswer(timing, 0, f"the server said: {event['error']}")
                for choice in event.get("choices", ()):
                    if choice.get("text") or choice.get("token_ids"):
                        count = len(choice.get("token_ids") or (0,))
                        timing.token_times_s[choice.get("index", 0)].extend([at_s] * count)
                usage = event.get("usage") or {}
                told = usage.get("completion_tokens", told)
        except (OSError, http.client.HTTPException, ValueError, IndexError, TypeError, AttributeError) as error:
            return StreamedAnswer(timing, 0, f"{type(error).__name__}: {error}")
        timing.end_s = now_s()
        seen = sum(map(len, timing.token_times_s))
        if not seen:
            return StreamedAnswer(timing, 0, "the stream had no text")
        return StreamedAnswer(timing, seen if told is None else told)

    def _models(self) -> list[str]:
        connection = self._connection()
        try:
            connection.request("GET", f"{self._path}/v1/models", headers=self._headers)
            response = connection.getresponse()
            content = response.read()
            if response.status != 200:
                raise BackendError(f"{self.url} answers {response.status} to /v1/models: {content[:200]!r}")
            return [entry["id"] for entry in json.loads(content)["data"]]
        except (OSError, http.client.HTTPException) as error:
            raise BackendError(f"nothing answers at {self.url} ({error}): start the server, or mend the URL") from None
        except (ValueError, KeyError, TypeError) as error:
            raise BackendError(f"{self.url} does not speak OpenAI's protocol (/v1/models: {error!r})") from None
        finally:
            connection.close()

    def _events(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The objects of a stream of server-sent events, up to [DONE]."""
        connection = self._connection()
        try:
            connection.request("POST", f"{self._path}/v1/completions", json.dumps(body), self._headers)
            response = connection.getresponse()
            if response.status != 200:
                raise http.client.HTTPException(f"status {response.status}: {response.read(300)!r}")
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
            raise http.client.HTTPException("the stream ended without [DONE]")
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=self._timeout_s)


def run_against_server(
    server: CompletionsServer,
    load: Load,
    arrivals: Arrivals,
    *,
    ignore_eos: bool = True,
    on_end: Callable[[], None] = lambda: None,
) -> ServeRun:
    """Send a load's requests as they arrive and time the answers.

    Args:
        ignore_eos: ask for full lengths, an extension that vLLM, SGLang and this project's server take
        on_end: called as each request ends

    Raises `ConfigError` for conversations, whose later turns need the token ids of answers.
    """
    if load.has_turns:
        raise ConfigError(f"{load.name} goes on from answers, whose token ids a server does not tell: use another")
    sampling: dict[str, Any] = {"temperature": load.temperature, "top_p": load.top_p}
    if ignore_eos:
        sampling["ignore_eos"] = True
    due = list(zip(arrivals.times_s(len(load.requests)), load.requests, strict=True))
    limit = min(arrivals.max_running or MAX_CONNECTIONS, MAX_CONNECTIONS)
    start_s = time.perf_counter()

    def now_s() -> float:
        return time.perf_counter() - start_s

    stopped = threading.Event()

    def send(due_s: float, request: LoadRequest) -> StreamedAnswer:
        stopped.wait(max(0.0, due_s - now_s()))
        timing = RequestTiming(due_s if arrivals.max_running is None else now_s())
        if stopped.is_set():
            return StreamedAnswer(timing, 0, "interrupted")
        return server.complete(request, sampling, timing, now_s)

    with ThreadPoolExecutor(min(limit, len(due))) as pool:
        futures: list[Future[StreamedAnswer]] = [pool.submit(send, due_s, request) for due_s, request in due]
        try:
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for _ in ended:
                    on_end()
        except KeyboardInterrupt:
            stopped.set()
            pool.shutdown(cancel_futures=True)
        answers = [future.result() for future in futures if future.done() and not future.cancelled()]
    return ServeRun(now_s(), answers)
