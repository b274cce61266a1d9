"""From logits to tokens.

Per sample, in this order, each on the renormalized outcome of the one before: repetition, presence and frequency
penalty, bias, min_tokens mask, token mask, temperature, top_k, top_p, min_p; then one draw (see `draw`). A token does
not depend on what else is sampled in the same step.

`choose` is the sampler: CUDA graphs hold it, and eager steps call it. On a CPU `NativeSampler` does the same in C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cascade_llm.outputs import TokenLogprob
from cascade_llm.sampling.draw import draw, first_largest, keep, softmax_weights, uniforms
from cascade_llm.sampling.lanes import LaneState, Needs
from cascade_llm.sampling.logprobs import padded_floats, token_logprobs
from cascade_llm.sampling.masks import TokenMasks
from cascade_llm.sampling.native_sampler import NativeSampler

__all__ = ["SampledTokens", "Sampler", "choose"]

CHUNK_ELEMENTS = 2**23
"""float32 logits worked on at a time (32 MiB): what sorting a chunk takes is some ten times as much."""
CPU_CHUNK_ELEMENTS = 2**19
"""The same on a CPU (2 MiB): a chunk stays in the cache, and its memory is used again."""


def choose(
    needs: Needs,
    logits: torch.Tensor,
    lane_state: LaneState,
    lanes: torch.Tensor,
    positions: torch.Tensor,
    *,
    masks: TokenMasks | None = None,
    in_graph: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose one token per row, without the host.

    Args:
        needs: what is done beyond the argmax: at least what these lanes need
        logits: [n, vocab], floating
        lane_state: whose tables are read
        lanes: [n], int64, whose parameters apply
        positions: [n], int64, the place that each token will have in its sequence
        masks: the tokens that each row may give; by default any
        in_graph: whether this is captured

    Returns:
        token ids [n], int64, inside the vocabulary; finite [n], bool, False where the logits held NaN or +inf, or only
        -inf: the token means nothing
    """
    if masks is None and not needs & (Needs.DRAW | Needs.ADJUST):
        maxima, token_ids = logits.max(-1)
        return token_ids, maxima.isfinite()
    chunk_len = max(1, (CPU_CHUNK_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS) // logits.shape[1])
    chosen = []
    for begin in range(0, len(logits), chunk_len):
        part = slice(begin, begin + chunk_len)
        values = padded_floats(logits[part])
        if needs & Needs.ADJUST:
            lane_state.adjust(values, lanes[part], positions[part], in_graph=in_graph)
        if masks is not None:
            TokenMasks(masks.bits, masks.rows[part]).apply(values)
        chosen.append(_choose_adjusted(needs, values, lane_state, lanes[part], positions[part]))
    token_ids, finite = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    return token_ids, finite


def _choose_adjusted(
    needs: Needs, values: torch.Tensor, lane_state: LaneState, lanes: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`choose` from adjusted logits [n, padded vocab], float32, which are changed."""
    token_ids, maxima = first_largest(values)
    finite = maxima.isfinite()
    if not needs & Needs.DRAW:
        return token_ids, finite
    temperatures = lane_state.temperatures(lanes)
    weights = softmax_weights(values, maxima, temperatures)
    if needs & Needs.FILTER:
        weights = keep(weights, lane_state.filters(lanes))
    drawn = draw(weights, uniforms(lane_state.draw_keys[lanes], positions))
    return torch.where((temperatures > 0) & finite, drawn, token_ids), finite


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One token per sample."""

    token_ids: torch.Tensor
    """[samples], int64, on the device"""
    finite: torch.Tensor
    """[samples], bool, on the device; False where the logits held NaN or +inf, or only -inf: the token means nothing"""
    logprobs: Sequence[TokenLogprob | None] = ()
    """[samples], the raw model's, None where a sample did not ask; empty where none did"""


class Sampler:
    """Chooses the tokens of an eager step; reads lanes and never changes them."""

    def __init__(self, lane_state: LaneState, *, compiled: bool = True) -> None:
        """compiled: whether to use `NativeSampler` where it works; torch gives the same tokens, but for rounding."""
        self._lane_state = lane_state
        self._native = NativeSampler.for_device(lane_state.device) if compiled else None

    def sample(
        self,
        logits: torch.Tensor,
        lanes: Sequence[int],
        positions: Sequence[int],
        rows: Sequence[int] | None = None,
        masks: TokenMasks | None = None,
    ) -> SampledTokens:
        """Choose one token per sample.

        Args:
            logits: [any, vocab], floating
            lanes: [samples], whose parameters apply; several samples of a lane have several positions
            positions: [samples], the place that the token will have in its sequence
            rows: [samples], the row of `logits` that each is chosen from; by default sample i's is row i
            masks: the tokens that each sample may be; by default any
        """
        rows = range(len(lanes)) if rows is None else rows
        if self._native is not None:
            chosen = self._native.sample(logits, rows, self._lane_state, lanes, positions, masks)
        else:
            chosen = self._choose_alike(logits, rows, lanes, positions, masks)
        return SampledTokens(*chosen, self._logprobs(logits, rows, lanes, chosen[0]))

    def _choose_alike(
        self,
        logits: torch.Tensor,
        rows: Sequence[int],
        lanes: Sequence[int],
        positions: Sequence[int],
        masks: TokenMasks | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`choose` for the samples of each need together, so that one that is filtered does not have all sorted."""
        device = logits.device
        columns = torch.tensor([list(rows), list(lanes), list(positions)], dtype=torch.int64, device=device)
        token_ids = torch.empty(len(lanes), dtype=torch.int64, device=device)
        finite = torch.empty(len(lanes), dtype=torch.bool, device=device)
        alike: dict[Needs, list[int]] = {}
        for i, lane in enumerate(lanes):
            alike.setdefault(self._lane_state.needs([lane]) & ~Needs.REPORT, []).append(i)
        for needs, samples in alike.items():
            part = torch.tensor(samples, device=device)
            row_index, lane_index, places = columns[:, part]
            part_masks = None if masks is None else TokenMasks(masks.bits, masks.rows[part])
            token_ids[part], finite[part] = choose(
                needs, logits[row_index], self._lane_state, lane_index, places, masks=part_masks
            )
        return token_ids, finite

    def _logprobs(
        self, logits: torch.Tensor, rows: Sequence[int], lanes: Sequence[int], token_ids: torch.Tensor
    ) -> Sequence[TokenLogprob | None]:
        if not self._lane_state.needs(lanes) & Needs.REPORT:
            return ()
        counts = [self._lane_state.params(lane).logprobs for lane in lanes]
        asking = [i for i, count in enumerate(counts) if count is not None]
        chosen = token_ids.tolist()
        reports = token_logprobs(
            logits, [rows[i] for i in asking], [chosen[i] for i in asking], [counts[i] or 0 for i in asking]
        )
        by_sample = dict(zip(asking, reports, strict=True))
        return [by_sample.get(i) for i in range(len(lanes))]
