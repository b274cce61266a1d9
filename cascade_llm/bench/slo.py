"""What a request's user is promised, and whether it was kept."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from cascade_llm.bench.online import RequestTiming
from cascade_llm.errors import ConfigError

__all__ = ["ServiceLevel"]


@dataclass(frozen=True)
class ServiceLevel:
    """A service-level objective; requests that meet it are the goodput.

    Raises `ConfigError` for a bound of 0 or less.
    """

    ttft_s: float
    """Most seconds to the first token."""
    tpot_s: float
    """Most seconds between a request's tokens in the mean, from its first to its last."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name} is {value}: it must be above 0")

    def is_met(self, timing: RequestTiming) -> bool:
        """Whether a request that ended well was in time."""
        first_s, gaps_s = timing.ttft_s, timing.gaps_s
        if first_s is None or first_s > self.ttft_s:
            return False
        return not gaps_s or statistics.fmean(gaps_s) <= self.tpot_s
