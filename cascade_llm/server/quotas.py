"""What each key has left of its quota: buckets that fill evenly, and requests under way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.keys import Quota

__all__ = ["RATE_HEADERS", "Lease", "QuotaKeeper"]

RATE_HEADERS = tuple(
    f"x-ratelimit-{what}-{of}" for what in ("limit", "remaining", "reset") for of in ("requests", "tokens")
)
"""What answers to keys with a quota may have."""
MINUTE_S = 60.0
RETRY_SOON_S = 1
"""Where no bucket says when: a request under way ends when it ends."""


ROUNDING = 1e-6
"""Of a level: who comes when he was told to is let in."""


class _Bucket:
    """Holds at most a minute's worth, and fills evenly."""

    def __init__(self, capacity: int, now_s: float) -> None:
        self.capacity = capacity
        self._level, self._updated_s = float(capacity), now_s

    def level(self, now_s: float) -> float:
        """What is in it; below 0 where more was used than was asked for."""
        self._level = min(self.capacity, self._level + (now_s - self._updated_s) * self.capacity / MINUTE_S)
        self._updated_s = now_s
        return self._level

    def add(self, amount: float, now_s: float) -> None:
        """Take out a negative amount, or put back."""
        self._level = self.level(now_s) + amount

    def wait_s(self, amount: float, now_s: float) -> float:
        """Until so much is in it."""
        return max(0.0, (amount - ROUNDING - self.level(now_s)) * MINUTE_S / self.capacity)

    def headers(self, what: str, now_s: float) -> dict[str, str]:
        """OpenAI's three."""
        level = self.level(now_s)
        return {
            f"x-ratelimit-limit-{what}": str(self.capacity),
            f"x-ratelimit-remaining-{what}": str(max(0, math.floor(level + ROUNDING))),
            f"x-ratelimit-reset-{what}": f"{self.wait_s(self.capacity, now_s):.3f}s",
        }


@dataclass(slots=True)
class Lease:
    """What one request has taken; `settle` gives back what it did not use."""

    _keeper: QuotaKeeper | None
    _num_taken: int

    def settle(self, num_used: int) -> None:
        """The request is over, having used so many tokens; a second call does nothing."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.end(self._num_taken - num_used)


class QuotaKeeper:
    """One key's quota. For one asyncio loop."""

    def __init__(self, quota: Quota, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds, from any start."""
        self._quota, self._clock = quota, clock
        limits = {"requests": quota.requests_per_minute, "tokens": quota.tokens_per_minute}
        self._buckets = {what: _Bucket(limit, clock()) for what, limit in limits.items() if limit is not None}
        self._num_open = 0

    @property
    def headers(self) -> Mapping[str, str]:
        """What answers say of the quota."""
        now_s = self._clock()
        return {k: v for what, bucket in self._buckets.items() for k, v in bucket.headers(what, now_s).items()}

    def check(self, num_tokens: int = 0) -> None:
        """Raise `ApiError` (429) where a request of so many tokens would be beyond the quota; takes nothing."""
        most = self._quota.max_concurrent
        if most is not None and self._num_open >= most:
            raise self._refusal(f"{most} requests of this key are under way, as many as it may have", RETRY_SOON_S)
        now_s, needed = self._clock(), self._needed(num_tokens)
        waits = {what: bucket.wait_s(needed[what], now_s) for what, bucket in self._buckets.items()}
        what = max(waits, key=waits.__getitem__, default=None)
        if what is not None and waits[what] > 0:
            limit = self._buckets[what].capacity
            raise self._refusal(f"this key may have {limit} {what} a minute", math.ceil(waits[what]))

    def take(self, num_tokens: int) -> Lease:
        """Take a request of so many tokens from the quota. Raises as `check`."""
        self.check(num_tokens)
        now_s, needed = self._clock(), self._needed(num_tokens)
        for what, bucket in self._buckets.items():
            bucket.add(-needed[what], now_s)
        self._num_open += 1
        return Lease(self, needed["tokens"])

    def end(self, num_unused: int) -> None:
        """A request is over; `num_unused` tokens of it come back, or are owed where that is negative."""
        self._num_open -= 1
        if (tokens := self._buckets.get("tokens")) is not None:
            tokens.add(num_unused, self._clock())

    def _needed(self, num_tokens: int) -> dict[str, int]:
        """One that could take more than a minute's tokens is let in where the bucket is full."""
        most = self._quota.tokens_per_minute
        return {"requests": 1, "tokens": num_tokens if most is None else min(num_tokens, most)}

    def _refusal(self, reason: str, retry_after_s: int) -> ApiError:
        return ApiError(
            429,
            f"{reason}: try again in {retry_after_s} s",
            code="rate_limit_exceeded",
            headers={**self.headers, "retry-after": str(retry_after_s)},
        )
