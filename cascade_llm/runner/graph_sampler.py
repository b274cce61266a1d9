"""Sampling that CUDA graphs can hold: the same draws as `sampler`, without anything that the host would wait for.

A feature set is what the samples of a step need together. Greedy steps and plain draws have graphs; filters, penalties,
bias, min_tokens and log-probabilities need sizes that the device alone knows, and are left to the eager sampler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch

from cascade_llm.plan import LaneStart
from cascade_llm.runner.candidates import BLOCK_LEN, first_argmax
from cascade_llm.runner.draw import draw, softmax_weights, uniforms
from cascade_llm.runner.lanes import LaneState
from cascade_llm.runner.workspace import Workspace

__all__ = ["FeatureSet", "GraphSampler", "LaneFeatures"]


class FeatureSet(IntEnum):
    """What the samples of a step need, each including those before."""

    GREEDY = 0
    DRAW = 1
    EAGER = 2
    """what no graph does"""


class LaneFeatures:
    """What each lane needs, noted when a sequence enters it."""

    def __init__(self, num_lanes: int) -> None:
        self._features = [FeatureSet.GREEDY] * num_lanes

    def start(self, starts: Iterable[LaneStart]) -> None:
        """Note the parameters of sequences that enter lanes."""
        for start in starts:
            self._features[start.lane] = _feature(start)

    def of(self, lanes: Sequence[int]) -> FeatureSet:
        """What these lanes need together."""
        return max(map(self._features.__getitem__, lanes), default=FeatureSet.GREEDY)


class GraphSampler:
    """Chooses a token for every row of a step from logits in fixed memory."""

    def __init__(self, lanes: LaneState, max_rows: int) -> None:
        self._lanes = lanes
        padded_len = lanes.vocab_size + -lanes.vocab_size % BLOCK_LEN
        self._values = torch.full((max_rows, padded_len), -torch.inf, device=lanes.device)
        self._workspace = Workspace()
        self._weights = self._workspace.take(
            "weights", (max_rows, padded_len), dtype=torch.float32, device=lanes.device
        )

    def sample(
        self,
        features: FeatureSet,
        logits: torch.Tensor,
        lanes: torch.Tensor,
        positions: torch.Tensor,
        results: torch.Tensor,
    ) -> None:
        """Choose, note each token in its lane, and write the results.

        Args:
            features: GREEDY or DRAW
            logits: [rows, vocab]
            lanes: [rows], int32, where the tokens go; rows that are not sampled name a lane that nobody reads
            positions: [rows], int32, of the rows; a token drawn has the next
            results: [2, rows], int64: tokens, and whether their logits were finite
        """
        assert features is not FeatureSet.EAGER
        rows, vocab_size = logits.shape
        values = self._values[:rows]
        values[:, :vocab_size] = logits
        index = lanes.long()
        token_ids, maxima = first_argmax(values)
        finite = maxima.isfinite()
        if features is FeatureSet.DRAW:
            temperatures = self._lanes.temperatures(index)
            bounded = torch.where(finite[:, None], values, 0.0)
            weights = softmax_weights(bounded, torch.where(finite, maxima, 0.0), temperatures, self._workspace)
            drawn = draw(weights, uniforms(self._lanes.draw_keys[index], positions.long() + 1))
            token_ids = torch.where(temperatures > 0, drawn, token_ids)
        self._lanes.last_tokens.index_copy_(0, index, token_ids)
        results[0] = token_ids
        results[1] = finite


def _feature(start: LaneStart) -> FeatureSet:
    params = start.params
    penalized = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    masks_ending = params.min_tokens and start.ending_token_ids
    if penalized or masks_ending or params.logit_bias or params.logprobs is not None:
        return FeatureSet.EAGER
    if params.greedy:
        return FeatureSet.GREEDY
    filtered = params.top_k or params.top_p < 1.0 or params.min_p > 0.0
    return FeatureSet.EAGER if filtered else FeatureSet.DRAW
