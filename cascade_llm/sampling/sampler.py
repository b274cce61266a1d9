"""From logits to tokens.

Per sample, in this order, each on the renormalized outcome of the one before: repetition, presence and frequency
penalty, bias, min_tokens mask, temperature, top_k, top_p, min_p; then one draw (see `draw`). Samples that need the
same work are done together, each sample as if it were alone: its token does not depend on its neighbours. Logits stay
in the model's dtype until a chunk of rows is chosen from; `NativeDraw`, where it works, reads most as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from cascade_llm.outputs import TokenLogprob
from cascade_llm.sampling.candidates import first_argmax, float_rows
from cascade_llm.sampling.draw import (
    draw,
    draw_min_p,
    draw_top_k,
    draw_top_p,
    softmax_weights,
    uniforms,
)
from cascade_llm.sampling.lanes import LaneState
from cascade_llm.sampling.logprobs import token_logprobs
from cascade_llm.sampling.native_draw import NativeDraw
from cascade_llm.sampling.workspace import Workspace
from cascade_llm.sampling_params import SamplingParams

__all__ = ["SampledTokens", "Sampler"]

CHUNK_ELEMENTS = 2**22
"""float32 logits worked on at a time (16 MiB)."""


class Choice(Enum):
    """How a token is chosen from adjusted logits."""

    GREEDY = "the first of the largest logits"
    PLAIN = "a draw from all tokens"
    TOP_K = "a draw from what top_k, and perhaps top_p and min_p, keep"
    TOP_P = "a draw from what top_p, and perhaps min_p, keep"
    MIN_P = "a draw from what min_p keeps"
    IN_PLACE = "by `NativeDraw`, from the model's own logits"
    COPIED = "by `NativeDraw`, from an adjusted copy"


FILTERED_DRAWS = {Choice.TOP_K: draw_top_k, Choice.TOP_P: draw_top_p, Choice.MIN_P: draw_min_p}


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
    """Chooses the tokens of a step; reads lanes and never changes them."""

    def __init__(self, lane_state: LaneState, *, compiled: bool = True) -> None:
        """compiled: whether to use `NativeDraw` where it works; torch gives the same tokens, up to float32 rounding."""
        self._lanes = lane_state
        self._workspace = Workspace()
        self._native = NativeDraw.for_device(lane_state.device) if compiled else None

    def sample(
        self, logits: torch.Tensor, lanes: Sequence[int], positions: Sequence[int], rows: Sequence[int] | None = None
    ) -> SampledTokens:
        """Choose one token per sample.

        Args:
            logits: [any, vocab], floating
            lanes: [samples], whose parameters apply
            positions: [samples], the place that the token will have in its sequence
            rows: [samples], the row of `logits` that each is chosen from; by default sample i's is row i
        """
        lanes, positions = list(lanes), list(positions)
        rows = list(range(len(lanes))) if rows is None else list(rows)
        token_ids = torch.empty(len(lanes), dtype=torch.int64, device=logits.device)
        finite = torch.empty(len(lanes), dtype=torch.bool, device=logits.device)
        chunk_len = max(1, CHUNK_ELEMENTS // logits.shape[1])
        for choice, samples in self._alike(lanes, self._native is not None and self._native.reads(logits)).items():
            part_len = len(samples) if choice is Choice.IN_PLACE else chunk_len
            for begin in range(0, len(samples), part_len):
                part = samples[begin : begin + part_len]
                part_rows = [rows[i] for i in part]
                part_lanes, part_positions = [lanes[i] for i in part], [positions[i] for i in part]
                chosen = self._choose_part(logits, choice, part_rows, part_lanes, part_positions)
                if len(part) == len(lanes):  # nothing to put together
                    token_ids, finite = chosen
                else:
                    where = torch.tensor(part, device=logits.device)
                    token_ids[where], finite[where] = chosen
        return SampledTokens(token_ids, finite, self._logprobs(logits, rows, lanes, token_ids))

    def prompt_logprobs(
        self, logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], counts: Sequence[int]
    ) -> list[TokenLogprob]:
        """The raw model's log-probabilities of given tokens; arguments as in `token_logprobs`, any int columns."""
        return token_logprobs(logits, list(rows), list(token_ids), list(counts), self._workspace)

    def _alike(self, lanes: list[int], in_place: bool) -> dict[Choice, list[int]]:
        """Sort the samples by how they are chosen; in_place: whether these logits can be read where they lie."""
        alike: dict[Choice, list[int]] = {}
        for i, lane in enumerate(lanes):
            if in_place and not self._lanes.adjusts(lane):
                choice = Choice.IN_PLACE
            else:
                choice = Choice.COPIED if self._native else _choice(self._lanes.params(lane))
            alike.setdefault(choice, []).append(i)
        return alike

    def _choose_part(
        self, logits: torch.Tensor, choice: Choice, rows: list[int], lanes: list[int], positions: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose for samples that need the same work: token ids [n], finite [n]."""
        if choice is Choice.IN_PLACE:
            return self._choose_natively(logits, rows, logits.shape[1], lanes, positions)
        values = float_rows(logits, rows, self._workspace)
        self._lanes.adjust(values, lanes, positions)
        if choice is Choice.COPIED:
            return self._choose_natively(values, range(len(rows)), logits.shape[1], lanes, positions)
        return self._choose(values, choice, lanes, positions)

    def _choose_natively(
        self, logits: torch.Tensor, rows: Sequence[int], vocab_size: int, lanes: list[int], positions: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`NativeDraw.sample` with what the lanes ask for."""
        assert self._native is not None
        if all(self._lanes.params(lane).greedy for lane in lanes):
            return self._native.argmax(logits, rows, vocab_size)
        lane_index = torch.tensor(lanes)
        uniform = uniforms(self._lanes.draw_keys[lane_index], torch.tensor(positions))
        temperatures, filters = self._lanes.temperatures(lane_index), self._lanes.filters(lane_index)
        return self._native.sample(logits, rows, vocab_size, temperatures, filters, uniform)

    def _choose(
        self, values: torch.Tensor, choice: Choice, lanes: list[int], positions: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose from adjusted logits [n, padded vocab], float32, whose memory is reused: token ids [n], finite [n]."""
        if choice is Choice.GREEDY:
            token_ids, maxima = first_argmax(values)
            return token_ids, maxima.isfinite()
        maxima = values.amax(-1)
        finite = maxima.isfinite()
        if not finite.all():
            _make_certain(0, values, maxima, ~finite)
        lane_index = torch.tensor(lanes, device=values.device)
        weights = softmax_weights(values, maxima, self._lanes.temperatures(lane_index), self._workspace)
        uniform = uniforms(self._lanes.draw_keys[lane_index], torch.tensor(positions, device=values.device))
        if choice is Choice.PLAIN:
            return draw(weights, uniform), finite
        return FILTERED_DRAWS[choice](weights, uniform, self._lanes.filters(lane_index), self._workspace), finite

    def _logprobs(
        self, logits: torch.Tensor, rows: list[int], lanes: list[int], token_ids: torch.Tensor
    ) -> Sequence[TokenLogprob | None]:
        counts = [self._lanes.params(lane).logprobs for lane in lanes]
        asking = [i for i, count in enumerate(counts) if count is not None]
        if not asking:
            return ()
        chosen = token_ids.tolist()
        reports = self.prompt_logprobs(
            logits, [rows[i] for i in asking], [chosen[i] for i in asking], [counts[i] or 0 for i in asking]
        )
        logprobs: list[TokenLogprob | None] = [None] * len(lanes)
        for i, report in zip(asking, reports, strict=True):
            logprobs[i] = report
        return logprobs


def _choice(params: SamplingParams) -> Choice:
    if params.greedy:
        return Choice.GREEDY
    if params.top_k:
        return Choice.TOP_K
    if params.top_p < 1.0:
        return Choice.TOP_P
    return Choice.MIN_P if params.min_p > 0.0 else Choice.PLAIN


def _make_certain(token_id: int, values: torch.Tensor, maxima: torch.Tensor, rows: torch.Tensor) -> None:
    """Replace the logits of broken rows (bool [n]) by ones that can be drawn from: one token has all the mass."""
    values[rows] = -torch.inf
    values[rows, token_id] = 0.0
    maxima[rows] = 0.0
