"""Requests that arrive by the clock, or as earlier ones end; when each of their tokens came."""

from __future__ import annotations

import heapq
import itertools
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from cascade_llm.bench.load import Load
from cascade_llm.bench.reading import COUNTERS, Reading
from cascade_llm.errors import ConfigError
from cascade_llm.llm import LLM, TokenStream
from cascade_llm.sampling_params import SamplingParams

__all__ = ["AllAtOnce", "Arrivals", "AtConcurrency", "AtRate", "OnlineRun", "RequestTiming", "run_requests"]


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
    """When each token of each sample came; tokens that come together have one time."""
    end_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token of any sample."""
        return min(times[0] for times in self.token_times_s if times) - self.arrival_s

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
    index: int
    stream: TokenStream
    timing: RequestTiming


def run_requests(llm: LLM, load: Load, arrivals: Arrivals) -> OnlineRun:
    """Run a load with its arrivals; an interruption ends what still runs."""
    return _OnlineLoop(llm, load, arrivals).run()


class _OnlineLoop:
    def __init__(self, llm: LLM, load: Load, arrivals: Arrivals) -> None:
        self._llm, self._load, self._arrivals = llm, load, arrivals
        roots = [index for index, request in enumerate(load.requests) if request.follows is None]
        self._due = list(zip(arrivals.times_s(len(roots)), roots, strict=True))
        heapq.heapify(self._due)
        self._followers: dict[int, list[int]] = {}
        for index, request in enumerate(load.requests):
            if request.follows is not None:
                self._followers.setdefault(request.follows, []).append(index)
        self._running: list[_Running] = []
        self._timings: dict[int, RequestTiming] = {}
        self._token_ids: dict[int, list[int]] = {}
        """Prompt and answer of what has ended and is gone on from."""
        self._start_s = 0.0

    def run(self) -> OnlineRun:
        before = self._llm.stats()
        self._start_s = time.perf_counter()
        try:
            while self._due or self._running:
                self._admit()
                if self._running:
                    self._llm.step()
                    self._collect()
                else:
                    time.sleep(max(0.0, self._due[0][0] - self._now_s()))
        finally:
            for running in self._running:
                running.stream.close()
        elapsed_s, after = self._now_s(), self._llm.stats()
        gained = {name: after[name] - before[name] for name in COUNTERS}
        reading = Reading(elapsed_s, gained["generated_tokens"], gained)
        return OnlineRun(reading, [self._timings[index] for index in range(len(self._load.requests))])

    def _now_s(self) -> float:
        return time.perf_counter() - self._start_s

    def _admit(self) -> None:
        limit = self._arrivals.max_running
        while self._due and self._due[0][0] <= self._now_s() and (limit is None or len(self._running) < limit):
            due_s, index = heapq.heappop(self._due)
            request = self._load.requests[index]
            before = [] if request.follows is None else self._token_ids[request.follows]
            params = SamplingParams(
                temperature=self._load.temperature,
                top_p=self._load.top_p,
                max_tokens=request.output_len,
                n=request.n,
                seed=index,
                ignore_eos=True,
            )
            timing = RequestTiming(due_s if limit is None else self._now_s(), [[] for _ in range(request.n)])
            self._timings[index] = timing
            stream = self._llm.stream([*before, *request.token_ids], params)
            self._running.append(_Running(index, stream, timing))

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
            running.timing.end_s = now_s
            self._end(running.index, [*output.prompt_token_ids, *output.outputs[0].token_ids])
        self._running = unfinished

    def _end(self, index: int, token_ids: list[int]) -> None:
        for follower in self._followers.get(index, ()):
            self._token_ids[index] = token_ids
            delay_s = self._load.requests[follower].delay_s if self._arrivals.by_clock else 0.0
            heapq.heappush(self._due, (self._now_s() + delay_s, follower))
