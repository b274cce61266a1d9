"""Sampling that CUDA graphs can hold: the same draws as `sampler`, without anything that the host would wait for.

A feature set is what the samples of a step need together. Greedy steps, plain draws and filtered draws have graphs;
penalties, bias, min_tokens and log-probabilities need sizes that the device alone knows, and are left to the eager
sampler. Filters are FlashInfer's: where several tokens tie at the edge of what is kept, it keeps them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum

import torch

from cascade_llm.attention.flashinfer_ops import FlashInferOps
from cascade_llm.plan import LaneStart
from cascade_llm.runner.candidates import BLOCK_LEN, first_argmax
from cascade_llm.runner.draw import Filters, draw, softmax_weights, uniforms
from cascade_llm.runner.lanes import LaneState
from cascade_llm.runner.workspace import Workspace

__all__ = ["FeatureSet", "GraphSampler", "LaneFeatures"]


class FeatureSet(IntEnum):
    """What the samples of a step need, each including those before."""

    GREEDY = 0
    DRAW = 1
    FILTERED_DRAW = 2
    EAGER = 3
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

    def __init__(self, lanes: LaneState, max_rows: int, ops: FlashInferOps) -> None:
        self._lanes, self._ops = lanes, ops
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
            features: anything but EAGER
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
        if features is not FeatureSet.GREEDY:
            temperatures = self._lanes.temperatures(index)
            bounded = torch.where(finite[:, None], values, 0.0)
            weights = softmax_weights(bounded, torch.where(finite, maxima, 0.0), temperatures, self._workspace)
            if features is FeatureSet.FILTERED_DRAW:
                weights = self._filtered(weights, self._lanes.filters(index))
            drawn = draw(weights, uniforms(self._lanes.draw_keys[index], positions.long() + 1))
            token_ids = torch.where(temperatures > 0, drawn, token_ids)
        self._lanes.last_tokens.index_copy_(0, index, token_ids)
        results[0] = token_ids
        results[1] = finite

    def _filtered(self, weights: torch.Tensor, filters: Filters) -> torch.Tensor:
        """What top_k, then top_p, then min_p keep of weights [rows, padded vocab]; not all ones in a row's sum."""
        ops, top_p = self._ops, filters.top_p.float()
        kept = ops.top_k_renorm_probs(weights, filters.top_k.clamp(min=1).int(), is_deterministic=True)
        kept = torch.where((filters.top_k < self._lanes.vocab_size)[:, None], kept, weights)
        filters_by_p = (top_p > 0.0) & (top_p < 1.0)  # FlashInfer takes such shares only; the padding lane holds zeros
        nucleus = ops.top_p_renorm_probs(kept, torch.where(filters_by_p, top_p, 0.5), is_deterministic=True)
        kept = torch.where(filters_by_p[:, None], nucleus, kept)
        floor = filters.min_p.float() * kept.amax(-1)
        return torch.where(kept >= floor[:, None], kept, 0.0)


def _feature(start: LaneStart) -> FeatureSet:
    params = start.params
    penalized = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0
    masks_ending = params.min_tokens and start.ending_token_ids
    if penalized or masks_ending or params.logit_bias or params.logprobs is not None:
        return FeatureSet.EAGER
    if params.greedy:
        return FeatureSet.GREEDY
    filtered = params.top_k or params.top_p < 1.0 or params.min_p > 0.0
    return FeatureSet.FILTERED_DRAW if filtered else FeatureSet.DRAW
