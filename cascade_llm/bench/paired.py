"""Decode of two of our engines against each other, in short turns: what one run each cannot tell from noise.

Both hold the same load at once, prompts cached, in one process, and take turns of a few steps: first, second, second,
first, ... A turn's value is the median time of its decode steps, a pair's ratio that of two neighbouring turns, which
do the same work at nearly the same moment. Whatever else the machine does for longer than a pair meets both.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from cascade_llm.bench.instruments import recorded_plans
from cascade_llm.bench.online import AllAtOnce, OnlineLoop
from cascade_llm.bench.reading import Spread
from cascade_llm.bench.sides import EngineSide

__all__ = ["PairedDecode", "measure_paired"]

MOST_STEPS, LEAST_STEPS = 4, 2
"""Of a turn. The first step of each finds its weights gone from the caches, which the median leaves out."""
WANTED_PAIRS, MOST_PAIRS = 8, 32


@dataclass(frozen=True)
class PairedDecode:
    """Turns of two sides; the same place is the same pair."""

    step_s: Sequence[float]
    """Of the first side: median seconds of a decode step in each turn."""
    other_step_s: Sequence[float]
    num_shared_steps: int
    """Decode steps of both sides whose plan had a shared level."""

    @property
    def ratio(self) -> Spread:
        """How many times as fast the first side is: median and quartiles of the pairs."""
        return Spread.quartiles([other / own for own, other in zip(self.step_s, self.other_step_s, strict=True)])

    @property
    def has_equal_plans(self) -> bool:
        """Whether both sides did the very same: what the ratio differs from 1 by is noise."""
        return self.num_shared_steps == 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "pairs": len(self.step_s),
            "step_s": list(self.step_s),
            "other_step_s": list(self.other_step_s),
            "equal_plans": self.has_equal_plans,
        }


def measure_paired(side: EngineSide, other: EngineSide) -> PairedDecode | None:
    """Run the load of two sides once, prompts cached as far as they are; None where it is too short for two pairs.

    Loads of many steps are broken off after `MOST_PAIRS`.
    """
    num_steps = max(request.output_len for request in side.load.requests) - 1
    turn_steps = max(LEAST_STEPS, min(MOST_STEPS, num_steps // WANTED_PAIRS))
    with ExitStack() as stack:
        engines = [_Turns(each, stack) for each in (side, other)]
        pairs: list[tuple[float, float]] = []
        while len(pairs) < MOST_PAIRS:
            values = dict.fromkeys(engines, 0.0)
            for engine in engines[:: 1 if len(pairs) % 2 == 0 else -1]:
                values[engine] = engine.turn(turn_steps)
            if not all(values.values()):
                break
            pairs.append((values[engines[0]], values[engines[1]]))
        shared = sum(engine.num_shared_steps for engine in engines)
    if len(pairs) < 2:
        return None
    return PairedDecode([own for own, _ in pairs], [theirs for _, theirs in pairs], shared)


class _Turns:
    """One engine's part."""

    def __init__(self, side: EngineSide, stack: ExitStack) -> None:
        self._plans = stack.enter_context(recorded_plans(side.llm))
        self._loop = OnlineLoop(side.llm, side.load, AllAtOnce())
        stack.callback(self._loop.close)
        self.num_shared_steps = 0

    def turn(self, num_steps: int) -> float:
        """Go on for so many decode steps, over other steps where they come; 0 where the load ends before."""
        times_s: list[float] = []
        while len(times_s) < num_steps:
            if self._loop.is_done:
                return 0.0
            self._plans.clear()
            step_s = self._loop.advance()
            if step_s is None or not self._plans:
                continue
            cascade = self._plans[-1].cascade
            if cascade.leaf.num_rows == cascade.leaf.num_segments:  # one row of each sequence
                times_s.append(step_s)
                self.num_shared_steps += bool(cascade.shared_levels)
        return statistics.median(times_s)
