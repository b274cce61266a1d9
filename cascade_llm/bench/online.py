"""Requests that arrive by the clock, or as earlier ones end; when each of their tokens came."""

from __future__ import annotations

import itertools
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from cascade_llm.bench.arrivals import Arrival, ArrivalQueue
from cascade_llm.bench.load import Load
from cascade_llm.bench.reading import Reading
from cascade_llm.engine.token_stream import TokenStream
from cascade_llm.errors import ConfigError
from cascade_llm.llm import LLM

__all__ = [
    "AllAtOnce",
    "Arrivals",
    "AtConcurrency",
    "AtRate",
    "OnlineLoop",
    "OnlineRun",
    "RequestTiming",
    "run_requests",
]


class Arrivals(ABC):
    """When the requests that follow no other arrive."""

    @abstractmethod
    def times_s(self, count: int) -> list[float]:
        """Seconds from the start, one per request, ascending."""

    @property
    def max_running(self) -> int | None:
        """Requests that may run at once; the others wait outside the engine, and have not arrived."""
        return None

    @property
    def by_clock(self) -> bool:
        """Whether a conversation's next question waits for its time."""
        return True

    def times_of(self, load: Load) -> list[float]:
        """`times_s` of the requests that follow no other."""
        return self.times_s(sum(request.follows is None for request in load.requests))

    def queue(self, load: Load) -> ArrivalQueue:
        """A run's requests, none of them sent."""
        return ArrivalQueue(load.as_dicts(), self.times_of(load), max_running=self.max_running, by_clock=self.by_clock)


@dataclass(frozen=True)
class AllAtOnce(Arrivals):
    """Every request at the start, each turn as soon as its predecessor has ended."""

    def times_s(self, count: int) -> list[float]:
        """All 0."""
        return [0.0] * count

    @property
    def by_clock(self) -> bool:
        """No."""
        return False


@dataclass(frozen=True)
class AtRate(Arrivals):
    """A Poisson process: independent arrivals, `per_s` of them a second in the mean."""

    per_s: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.per_s > 0:
            raise ConfigError(f"the request rate is {self.per_s}: it must be above 0 requests a second")

    def times_s(self, count: int) -> list[float]:
        """Sums of exponential gaps."""
        rng = random.Random(self.seed)
        return list(itertools.accumulate(rng.expovariate(self.per_s) for _ in range(count)))


@dataclass(frozen=True)
class AtConcurrency(Arrivals):
    """So many users, each sending the next request when the last has ended."""

    users: int

    def __post_init__(self) -> None:
        if self.users < 1:
            raise ConfigError(f"concurrency is {self.users}: it must be 1 or larger")

    def times_s(self, count: int) -> list[float]:
        """All 0; `max_running` holds them back."""
        return [0.0] * count

    @property
    def max_running(self) -> int | None:
        """The users."""
        return self.users


@dataclass
class RequestTiming:
    """Seconds since the start of the run."""

    arrival_s: float
    token_times_s: list[list[float]] = field(default_factory=list)
    """When each token of each sample came; tokens that come together have one time; empty where that is not told."""
    end_s: float = 0.0

    @property
    def ttft_s(self) -> float | None:
        """From arrival to the first token of any sample; None where an engine does not tell the times of tokens."""
        first = [times[0] for times in self.token_times_s if times]
        return min(first) - self.arrival_s if first else None

    @property
    def e2e_s(self) -> float:
        """From arrival to the last token of all samples."""
        return self.end_s - self.arrival_s

    @property
    def gaps_s(self) -> list[float]:
        """Between a sample's tokens."""
        return [after - before for times in self.token_times_s for before, after in itertools.pairwise(times)]


@dataclass(frozen=True)
class OnlineRun:
    """A whole run."""

    reading: Reading
    timings: Sequence[RequestTiming]
    """In the order of the load's requests."""


@dataclass
class _Running:
    arrival: Arrival
    stream: TokenStream
    timing: RequestTiming


def run_requests(llm: LLM, load: Load, arrivals: Arrivals) -> OnlineRun:
    """Run a load with its arrivals; an interruption ends what still runs."""
    loop = OnlineLoop(llm, load, arrivals)
    try:
        while not loop.is_done:
            loop.advance()
    finally:
        loop.close()
    return loop.result()


class OnlineLoop:
    """A run of a load on one engine, moved on step by step, so that others may be moved on in between."""

    def __init__(self, llm: LLM, load: Load, arrivals: Arrivals) -> None:
        """The clock of the arrivals starts here."""
        self._llm, self._load = llm, load
        self._queue = arrivals.queue(load)
        self._running: list[_Running] = []
        self._timings: dict[int, RequestTiming] = {}
        self._before = llm.stats()
        self._start_s = time.perf_counter()
        self._elapsed_s = 0.0

    @property
    def is_done(self) -> bool:
        """Whether every request has ended."""
        return not self._queue and not self._running

    def advance(self) -> float | None:
        """Send what is due and make one step; returns its seconds, None where there was nothing to do but wait."""
        for arrival in self._queue.take(self._now_s(), len(self._running)):
            self._send(arrival)
        if not self._running:
            time.sleep(self._queue.wait_s(self._now_s(), 0) or 0.0)
            return None
        start_s = time.perf_counter()
        self._llm.step()
        step_s = time.perf_counter() - start_s
        self._collect()
        return step_s

    def close(self) -> None:
        """End what still runs."""
        for running in self._running:
            running.stream.close()
        self._running = []

    def result(self) -> OnlineRun:
        """Of a run that is done."""
        reading = Reading.since(self._before, self._llm, self._elapsed_s)
        return OnlineRun(reading, [self._timings[index] for index in range(len(self._load.requests))])

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def _send(self, arrival: Arrival) -> None:
        params = self._load.params(arrival.request_index)
        timing = RequestTiming(arrival.arrival_s, [[] for _ in range(params.n)])
        self._timings[arrival.request_index] = timing
        self._running.append(_Running(arrival, self._llm.stream(arrival.token_ids, params), timing))

    def _collect(self) -> None:
        now_s, unfinished = self._now_s(), []
        for running in self._running:
            for delta in running.stream.poll():
                running.timing.token_times_s[delta.index].extend([now_s] * len(delta.token_ids))
            output = running.stream.output
            if not output.finished:
                unfinished.append(running)
                continue
            if output.error is not None:
                raise output.error
            running.timing.end_s = self._elapsed_s = now_s
            said = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            self._queue.end(running.arrival.request_index, now_s, said)
        self._running = unfinished
