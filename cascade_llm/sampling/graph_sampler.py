"""Sampling that CUDA graphs can hold: the same draws as `sampler`, without anything that the host would wait for.

Filters are FlashInfer's: where several tokens tie at the edge of what is kept, it keeps them all.
"""

from __future__ import annotations

import torch

from cascade_llm.attention.flashinfer.ops import FlashInferOps
from cascade_llm.sampling.candidates import BLOCK_LEN, first_argmax
from cascade_llm.sampling.draw import Filters, draw, draw_from_logits, softmax_weights, uniforms
from cascade_llm.sampling.graph_logprobs import GraphLogprobs
from cascade_llm.sampling.lane_lists import LaneLists
from cascade_llm.sampling.lanes import LaneState
from cascade_llm.sampling.sampling_features import Adjustment, Choice, FeatureSet
from cascade_llm.sampling.token_usage import UsageTable
from cascade_llm.sampling.workspace import Workspace

__all__ = ["GraphSampler"]


class GraphSampler:
    """Chooses a token for every row of a step from logits in fixed memory. Owns no lanes: it reads and notes."""

    def __init__(
        self,
        lanes: LaneState,
        usage: UsageTable,
        lists: LaneLists,
        logprobs: GraphLogprobs,
        max_rows: int,
        ops: FlashInferOps,
    ) -> None:
        self._lanes, self._usage, self._lists, self._logprobs, self._ops = lanes, usage, lists, logprobs, ops
        padded_len = lanes.vocab_size + -lanes.vocab_size % BLOCK_LEN
        self._values = torch.full((max_rows, padded_len), -torch.inf, device=lanes.device)
        self._workspace = Workspace()
        # graphs keep addresses: this memory must not be replaced by a larger one when more rows are captured later
        self._workspace.take("weights", (max_rows, padded_len), dtype=torch.float32, device=lanes.device)

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
            features: what is done beyond the argmax
            logits: [rows, vocab]
            lanes: [rows], int32, where the tokens go; rows that are not sampled name a lane that nobody reads
            positions: [rows], int32, of the rows; a token drawn has the next
            results: [2, rows], int64: tokens, and whether their logits were finite
        """
        rows, vocab_size = logits.shape
        values, index = self._values[:rows], lanes.long()
        needs_places = features.choice > Choice.GREEDY or features.adjustment >= Adjustment.LISTS
        places = positions.long() + 1 if needs_places else positions
        values[:, :vocab_size] = logits
        normalizers = self._logprobs.note_raw(values, self._workspace) if features.logprobs else None
        if features.adjustment >= Adjustment.PENALTIES:
            self._usage.penalize_rows(values, index)
        if features.adjustment >= Adjustment.LISTS:
            self._lists.apply(values, index, places)
        token_ids, finite = self._choose(features.choice, values, index, places)
        if normalizers is not None:
            self._logprobs.note_chosen(logits, token_ids, normalizers)
        if features.adjustment >= Adjustment.PENALTIES:
            self._usage.note(index, token_ids)
        self._lanes.last_tokens.index_copy_(0, index, token_ids)
        results[0] = token_ids
        results[1] = finite

    def _choose(
        self, choice: Choice, values: torch.Tensor, lanes: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From adjusted logits [rows, padded vocab]: token ids [rows], inside the vocabulary, and whether finite."""
        token_ids, maxima = first_argmax(values)
        finite = maxima.isfinite()
        if choice is Choice.GREEDY:
            return token_ids, finite
        temperatures, keys = self._lanes.temperatures(lanes), self._lanes.draw_keys[lanes]
        if choice is Choice.DRAW:
            drawn = draw_from_logits(values, maxima, temperatures, uniforms(keys, places))
        else:
            bounded = torch.where(finite[:, None], values, 0.0)
            weights = softmax_weights(bounded, torch.where(finite, maxima, 0.0), temperatures, self._workspace)
            drawn = draw(self._filtered(weights, self._lanes.filters(lanes)), uniforms(keys, places))
        return torch.where((temperatures > 0) & finite, drawn, token_ids), finite

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
