"""Whether ranks still work, while somebody waits for them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Pulse", "RankWatch"]


@dataclass
class Pulse:
    """What was last heard of a rank."""

    heard_at: float | None = None
    """When it last said anything, in `time.monotonic` seconds; None before it has said a word."""
    num_exchanges: int = 0
    """Exchanges with other ranks that it had begun by then."""


class RankWatch:
    """Looks at ranks from the moment somebody begins to wait.

    A step of many tokens may take minutes on a CPU, but then the ranks exchange something in every layer.
    """

    def __init__(self, pulses: Sequence[Pulse], timeout_s: float, *, in_step: bool, now: float | None = None) -> None:
        """Begin to wait.

        Args:
            pulses: of all ranks, in order; kept up to date by whoever hears them
            timeout_s: how long a rank may be silent, or all of them without progress
            in_step: whether a step is waited for, in which ranks exchange something
            now: the time, in `time.monotonic` seconds; default asks
        """
        self._pulses, self._timeout_s, self._in_step = pulses, timeout_s, in_step and len(pulses) > 1
        self._began_at = self._moved_at = time.monotonic() if now is None else now
        self._counts = [pulse.num_exchanges for pulse in pulses]

    def look(self, now: float | None = None) -> tuple[int, str] | None:
        """The rank that hangs, and how that shows; None while all is well."""
        now = time.monotonic() if now is None else now
        for rank, pulse in enumerate(self._pulses):
            if pulse.heard_at is not None and now - max(pulse.heard_at, self._began_at) > self._timeout_s:
                return rank, f"has not answered for {self._timeout_s:g} s"
        counts = [pulse.num_exchanges for pulse in self._pulses]
        if counts != self._counts:
            self._counts, self._moved_at = counts, now
        elif self._in_step and now - self._moved_at > self._timeout_s:
            return counts.index(min(counts)), f"has kept the others waiting for {self._timeout_s:g} s in a step"
        return None
