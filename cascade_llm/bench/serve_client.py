"""A client that measures any server which speaks OpenAI's completions protocol: streams, timed as their events come.

One thread and one connection per request that is under way. An event counts as one token where the server does not say
how many its text is; the totals come from the server's own `usage` where it tells.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

from cascade_llm.bench.arrivals import Arrival
from cascade_llm.bench.load import Load, LoadRequest
from cascade_llm.bench.online import Arrivals, RequestTiming
from cascade_llm.bench.openai_server import OpenAIServer

__all__ = ["CompletionsServer", "ServeRun", "StreamedAnswer", "run_against_server"]

MAX_CONNECTIONS = 1024


@dataclass(frozen=True)
class StreamedAnswer:
    """One request's stream."""

    timing: RequestTiming
    num_generated: int
    error: str | None = None
    """Why it ended early; None where it ended well."""
    token_ids: Sequence[int] = ()
    """Of the first sample, as far as the server tells."""


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


class CompletionsServer(OpenAIServer):
    """A server that prompts of token ids are sent to."""

    def complete(
        self,
        token_ids: Sequence[int],
        request: LoadRequest,
        sampling: Mapping[str, Any],
        timing: RequestTiming,
        now_s: Callable[[], float],
    ) -> StreamedAnswer:
        """Stream the answer to a prompt; whatever goes wrong is in the answer, not raised."""
        body = {
            "model": self.model,
            "prompt": list(token_ids),
            "max_tokens": request.output_len,
            "n": request.n,
            "stream": True,
            "stream_options": {"include_usage": True},
            **sampling,
        }
        timing.token_times_s = [[] for _ in range(request.n)]
        told: int | None = None
        said: list[int] = []
        try:
            for event in self.stream("/v1/completions", body):
                at_s = now_s()
                if "error" in event:
                    return StreamedAnswer(timing, 0, f"the server said: {event['error']}")
                for choice in event.get("choices", ()):
                    if choice.get("text") or choice.get("token_ids"):
                        count = len(choice.get("token_ids") or (0,))
                        timing.token_times_s[choice.get("index", 0)].extend([at_s] * count)
                        if choice.get("index", 0) == 0:
                            said += choice.get("token_ids") or ()
                usage = event.get("usage") or {}
                told = usage.get("completion_tokens", told)
        except (OSError, http.client.HTTPException, ValueError, IndexError, TypeError, AttributeError) as error:
            return StreamedAnswer(timing, 0, f"{type(error).__name__}: {error}")
        timing.end_s = now_s()
        seen = sum(map(len, timing.token_times_s))
        if not seen:
            return StreamedAnswer(timing, 0, "the stream had no text")
        return StreamedAnswer(timing, seen if told is None else told, token_ids=said)


def run_against_server(
    server: CompletionsServer,
    load: Load,
    arrivals: Arrivals,
    *,
    ignore_eos: bool = True,
    on_end: Callable[[], None] = lambda: None,
) -> ServeRun:
    """Send a load's requests as they arrive and time the answers; an interruption sends no more of them.

    Args:
        load: where later turns go on from real answers, the server is asked for token ids (`return_token_ids`, an
            extension that vLLM and this project's server take); a turn whose predecessor failed fails too
        ignore_eos: ask for full lengths, an extension that vLLM, SGLang and this project's server take
        on_end: called as each request ends
    """
    return _ServeLoop(server, load, arrivals, ignore_eos=ignore_eos, on_end=on_end).run()


class _ServeLoop:
    def __init__(
        self,
        server: CompletionsServer,
        load: Load,
        arrivals: Arrivals,
        *,
        ignore_eos: bool,
        on_end: Callable[[], None],
    ) -> None:
        self._server, self._load, self._on_end = server, load, on_end
        self._sampling: dict[str, Any] = {"temperature": load.temperature, "top_p": load.top_p}
        if ignore_eos:
            self._sampling["ignore_eos"] = True
        self._goes_on = {request.follows for request in load.requests if load.goes_on(request)}
        """Requests whose answers' token ids are needed."""
        self._queue = arrivals.queue(load)
        self._pool = ThreadPoolExecutor(min(arrivals.max_running or MAX_CONNECTIONS, MAX_CONNECTIONS))
        self._sent: dict[Future[StreamedAnswer], Arrival] = {}
        self._answers: dict[int, StreamedAnswer] = {}
        self._start_s = 0.0

    def run(self) -> ServeRun:
        """The answers in the order of the load's requests."""
        self._start_s = time.perf_counter()
        with self._pool:
            try:
                while self._queue or self._sent:
                    self._send_due()
                    ended, _ = self._wait()
                    for future in ended:
                        self._end(self._sent.pop(future), future.result())
            except KeyboardInterrupt:
                self._pool.shutdown(cancel_futures=True)
                for future, arrival in self._sent.items():
                    self._answers[arrival.request_index] = (
                        StreamedAnswer(RequestTiming(arrival.arrival_s), 0, "interrupted")
                        if future.cancelled()
                        else future.result()
                    )
                missing = set(range(len(self._load.requests))) - self._answers.keys()
                interrupted = StreamedAnswer(RequestTiming(0.0), 0, "interrupted")
                self._answers.update(dict.fromkeys(missing, interrupted))
        elapsed_s = self._now_s()
        return ServeRun(elapsed_s, [self._answers[index] for index in sorted(self._answers)])

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def _send_due(self) -> None:
        for arrival in self._queue.take(self._now_s(), len(self._sent)):
            request, sampling = self._load.requests[arrival.request_index], self._sampling
            if arrival.request_index in self._goes_on:
                sampling = {**sampling, "return_token_ids": True}
            timing = RequestTiming(arrival.arrival_s)
            future = self._pool.submit(self._server.complete, arrival.token_ids, request, sampling, timing, self._now_s)
            self._sent[future] = arrival

    def _wait(self) -> tuple[set[Future[StreamedAnswer]], set[Future[StreamedAnswer]]]:
        """Until an answer has ended or a request is due."""
        wait_s = self._queue.wait_s(self._now_s(), len(self._sent))
        if self._sent:
            return wait(self._sent, timeout=wait_s, return_when=FIRST_COMPLETED)
        time.sleep(wait_s or 0.0)
        return set(), set()

    def _end(self, arrival: Arrival, answer: StreamedAnswer) -> None:
        index = arrival.request_index
        output_len = self._load.requests[index].output_len
        if answer.error is None and index in self._goes_on and len(answer.token_ids) != output_len:
            error = (
                f"the server told {len(answer.token_ids)} of {output_len} token ids, which the next turn goes on from: "
                "choose --history recorded"
            )
            answer = replace(answer, error=error)
        self._answers[index] = answer
        self._on_end()
        if answer.error is None:
            self._queue.end(index, self._now_s(), [*arrival.token_ids, *answer.token_ids])
            return
        for later in self._queue.fail(index):
            self._answers[later] = StreamedAnswer(RequestTiming(0.0), 0, f"the turn before it failed: {answer.error}")
            self._on_end()
