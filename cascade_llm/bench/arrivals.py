"""Which requests of a load are due: by the clock, behind the ends of others, and below a limit of how many run.

Our engine and the drivers of others go by this same queue, so each of them meets the same arrivals. Drivers run in
interpreters that have not cascade-llm: the standard library is all there is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Arrival", "ArrivalQueue"]


class Arrival(NamedTuple):
    """A request that is to be sent now."""

    request_index: int
    """In the load's requests."""
    token_ids: list[int]
    """The whole prompt, what was said before included."""
    arrival_s: float
    """Since the start of the run: when it was due, or, where users wait for each other, now."""


class ArrivalQueue:
    """The requests of one run that have not been sent."""

    def __init__(
        self,
        requests: Sequence[Mapping[str, Any]],
        times_s: Sequence[float],
        *,
        max_running: int | None,
        by_clock: bool,
    ) -> None:
        """Fill it.

        Args:
            requests: {"token_ids", "follows", "delay_s", "goes_on"} and more; "follows" is the index of the request
                whose end one waits for, None for none; "goes_on" says whether that one's prompt and answer come first
            times_s: seconds from the start, one for each request that follows none
            max_running: requests that may run at once; None is no limit
            by_clock: whether a request waits `delay_s` after the end of the one that it follows
        """
        self._requests, self._max_running, self._by_clock = requests, max_running, by_clock
        roots = [index for index, request in enumerate(requests) if request["follows"] is None]
        self._due = list(zip(times_s, roots, strict=True))
        heapq.heapify(self._due)
        self._followers: dict[int, list[int]] = {}
        for index, request in enumerate(requests):
            if request["follows"] is not None:
                self._followers.setdefault(request["follows"], []).append(index)
        self._said: dict[int, list[int]] = {}
        """Prompt and answer of what has ended and is gone on from."""

    def __len__(self) -> int:
        """Requests whose time of arrival is known; those that follow a running one are not among them."""
        return len(self._due)

    def take(self, now_s: float, num_running: int) -> Iterator[Arrival]:
        """Remove and yield what is due, as far as the limit lets it run beside `num_running` others."""
        while self._has_room(num_running) and self._due and self._due[0][0] <= now_s:
            due_s, index = heapq.heappop(self._due)
            request = self._requests[index]
            before = self._said[request["follows"]] if request["goes_on"] else []
            num_running += 1
            yield Arrival(index, [*before, *request["token_ids"]], due_s if self._max_running is None else now_s)

    def wait_s(self, now_s: float, num_running: int) -> float | None:
        """Seconds until `take` has something; None where first a running one has to end."""
        if not self._due or not self._has_room(num_running):
            return None
        return max(0.0, self._due[0][0] - now_s)

    def end(self, index: int, now_s: float, token_ids: Sequence[int]) -> None:
        """A request has ended; `token_ids` are its whole prompt and the answer's first sample."""
        for follower in self._followers.get(index, ()):
            request = self._requests[follower]
            if request["goes_on"]:
                self._said[index] = list(token_ids)
            heapq.heappush(self._due, (now_s + (request["delay_s"] if self._by_clock else 0.0), follower))

    def fail(self, index: int) -> list[int]:
        """A request has failed; returns those that would have followed, which never become due."""
        direct = self._followers.get(index, [])
        return [*direct, *(later for follower in direct for later in self.fail(follower))]

    def _has_room(self, num_running: int) -> bool:
        return self._max_running is None or num_running < self._max_running
