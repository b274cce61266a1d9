"""What the samples of a step need together: which sampling graph serves it, or why none does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from itertools import product
from typing import NamedTuple

from cascade_llm.plan import IntColumn, LaneStart
from cascade_llm.sampling.graph_logprobs import LOGPROBS_CAPACITY
from cascade_llm.sampling.lane_lists import BIAS_CAPACITY, ENDING_CAPACITY, has_lists, masked_endings
from cascade_llm.sampling.token_usage import is_penalized

__all__ = ["Adjustment", "Choice", "FeatureSet", "LaneFeatures"]


class Choice(IntEnum):
    """How tokens are chosen from adjusted logits, each including those before."""

    GREEDY = 0
    DRAW = 1
    FILTERED_DRAW = 2


class Adjustment(IntEnum):
    """What is done to logits before, each including those before."""

    NONE = 0
    LISTS = 1
    """logit_bias and the min_tokens mask: a few logits of a row"""
    PENALTIES = 2
    """whole rows"""


class FeatureSet(NamedTuple):
    """What one graph does."""

    choice: Choice = Choice.GREEDY
    adjustment: Adjustment = Adjustment.NONE
    logprobs: bool = False

    def joined(self, other: FeatureSet) -> FeatureSet:
        """What both need."""
        return FeatureSet(*(max(pair) for pair in zip(self, other, strict=True)))  # type: ignore[arg-type]

    @classmethod
    def every(cls) -> Iterator[FeatureSet]:
        """All there are."""
        return (cls(*fields) for fields in product(Choice, Adjustment, (False, True)))

    def __str__(self) -> str:
        names = [self.choice.name, self.adjustment.name if self.adjustment else "", "LOGPROBS" if self.logprobs else ""]
        return " + ".join(name for name in names if name).lower().replace("_", " ")


class LaneFeatures:
    """What each lane needs, noted when a sequence enters it."""

    def __init__(self, num_lanes: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._features: list[FeatureSet | str] = [FeatureSet()] * num_lanes
        self._logprobs: list[int | None] = [None] * num_lanes
        self._last: tuple[IntColumn | Sequence[int], FeatureSet | str] | None = None

    def start(self, starts: Iterable[LaneStart]) -> None:
        """Note the parameters of sequences that enter lanes."""
        for start in starts:
            self._last = None
            self._features[start.lane] = _features(start, self._vocab_size)
            self._logprobs[start.lane] = start.params.logprobs

    def of(self, lanes: IntColumn | Sequence[int]) -> FeatureSet | str:
        """What these lanes need together, or what one of them asks for that no graph does.

        Steps in which nobody comes or goes have the same object for their lanes, and the same answer.
        """
        if self._last is None or self._last[0] is not lanes:
            self._last = lanes, self._joined(dict.fromkeys(self._features[lane] for lane in lanes))
        return self._last[1]

    def _joined(self, wanted: Iterable[FeatureSet | str]) -> FeatureSet | str:
        together = FeatureSet()
        for features in wanted:
            if isinstance(features, str):
                return features
            together = together.joined(features)
        return together

    def logprob_counts(self, lanes: Sequence[int]) -> list[int | None]:
        """How many most probable tokens each of these lanes wants reported; None where nothing is."""
        return [self._logprobs[lane] for lane in lanes]


def _features(start: LaneStart, vocab_size: int) -> FeatureSet | str:
    params = start.params
    if len(params.logit_bias or {}) > BIAS_CAPACITY:
        return f"a logit_bias of more than {BIAS_CAPACITY} tokens"
    if len(masked_endings(start, vocab_size)) > ENDING_CAPACITY:
        return f"min_tokens with more than {ENDING_CAPACITY} ending tokens"
    if (params.logprobs or 0) > LOGPROBS_CAPACITY:
        return f"more than {LOGPROBS_CAPACITY} log-probabilities"
    if is_penalized(start):
        adjustment = Adjustment.PENALTIES
    else:
        adjustment = Adjustment.LISTS if has_lists(start, vocab_size) else Adjustment.NONE
    if params.greedy:
        choice = Choice.GREEDY
    else:
        filtered = params.top_k or params.top_p < 1.0 or params.min_p > 0.0
        choice = Choice.FILTERED_DRAW if filtered else Choice.DRAW
    return FeatureSet(choice, adjustment, params.logprobs is not None)
