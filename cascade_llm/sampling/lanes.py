"""Lanes: what the device remembers of each sequence between steps.

A sequence keeps its lane, a fixed index, from `start` until the scheduler gives the lane to another; rows are
reordered from step to step, lanes never. The host knows what each lane needs, so a step does only what its own lanes
ask for: with greedy lanes alone that is an argmax.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntFlag

import torch

from cascade_llm.plan import LaneStart
from cascade_llm.sampling.draw import Filters, draw_key
from cascade_llm.sampling.lane_tables import TokenLists, Upload, UsageCounts, masked_endings
from cascade_llm.sampling_params import SamplingParams

__all__ = ["BIAS_CAPACITY", "ENDING_CAPACITY", "NO_TOKEN", "LaneState", "Needs"]

NO_TOKEN = -1
"""Smaller than every token id: of two sources of which one has a token, the larger is it."""
TEMPERATURE, TOP_P, MIN_P = range(3)
BIAS_CAPACITY = 512
ENDING_CAPACITY = 64


class Needs(IntFlag):
    """What a sample needs beyond the argmax of its logits. To do more changes nothing."""

    NOTHING = 0
    DRAW = 1
    FILTER = 2
    """top_k, top_p or min_p"""
    ADJUST = 4
    """penalties, logit_bias, the min_tokens mask"""
    REPORT = 8
    """log-probabilities"""


class LaneState:
    """Per-sequence device state, one entry per lane. Changed by `start` and `record` only."""

    def __init__(
        self,
        num_lanes: int,
        vocab_size: int,
        device: torch.device | str = "cpu",
        *,
        max_model_len: int = 2**31 - 1,
        upload: Upload | None = None,
        in_graphs: bool = False,
    ) -> None:
        """Set memory aside.

        Args:
            num_lanes: how many sequences run at once
            vocab_size: columns of the logits, which may be more than the tokenizer has tokens
            device: where the state lies
            max_model_len: tokens of the longest sequence
            upload: brings host tensors to the device; the default waits until they are there
            in_graphs: whether graphs read the tables, which then exist from the start and stay where they are
        """
        self.num_lanes, self.vocab_size, self.device = num_lanes, vocab_size, torch.device(device)
        self.last_tokens = torch.zeros(num_lanes + 1, dtype=torch.int64, device=device)
        """[num_lanes + 1], what a lane's next row reads when the plan leaves its token to the lane; see `no_lane`"""
        self.last_tokens[self.no_lane] = NO_TOKEN
        self.draw_keys = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        """[num_lanes], see `draw_key`"""
        self.top_k = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self.shares = torch.zeros(num_lanes, 3, dtype=torch.float64, device=device)
        """[num_lanes, 3]: temperature, top_p, min_p"""
        self._upload: Upload = upload or (lambda values: values.to(self.device))
        self.usage = UsageCounts(num_lanes, vocab_size, max_model_len, self.device, self._upload)
        capacities = (BIAS_CAPACITY, ENDING_CAPACITY) if in_graphs else None
        self.lists = TokenLists(num_lanes, vocab_size, self.device, self._upload, capacities)
        self._long_lists = TokenLists(num_lanes, vocab_size, self.device, self._upload)
        """What does not fit into the lists that graphs read."""
        if in_graphs:
            self.usage.allocate()
        self.num_starts = 0
        """Sequences that have entered lanes: while it does not grow, what lanes need stays the same."""
        self._starts: list[LaneStart | None] = [None] * num_lanes
        self._needs = [Needs.NOTHING] * num_lanes
        self._with_long_lists: set[int] = set()

    @property
    def no_lane(self) -> int:
        """The place in `last_tokens` that never holds a token."""
        return self.num_lanes

    def start(self, starts: Sequence[LaneStart]) -> None:
        """Set the state of lanes that a sequence enters, whatever they held before.

        The token ids of `logit_bias` lie inside the vocabulary: admission has checked it.
        """
        if not starts:
            return
        lanes = self._index([start.lane for start in starts])
        self.last_tokens[lanes] = self._index([_last_token(start) for start in starts])
        self.draw_keys[lanes] = self._index([draw_key(start.seed, start.sample_index) for start in starts])
        self.top_k[lanes] = self._index([start.params.top_k or self.vocab_size for start in starts])
        shares = [(start.params.temperature, start.params.top_p, start.params.min_p) for start in starts]
        self.shares[lanes] = self._upload(torch.tensor(shares, dtype=torch.float64))
        self.usage.start(starts)
        self.num_starts += len(starts)
        for start in starts:
            self._starts[start.lane] = start
            self._needs[start.lane] = self._start_lists(start) | _needs(start)

    def record(self, lanes: Sequence[int], tokens: torch.Tensor) -> None:
        """Note sampled tokens [samples], int64, one per lane: the next input, and from now on used."""
        if len(lanes):
            self.note(self._index(lanes), tokens)

    def note(self, lanes: torch.Tensor, tokens: torch.Tensor, *, count: bool = True) -> None:
        """`record` without the host: int64 [n] each; `count`: whether some of these lanes may have penalties."""
        self.last_tokens.index_copy_(0, lanes, tokens)
        if count:
            self.usage.note(lanes, tokens)

    def params(self, lane: int) -> SamplingParams:
        """What the sequence in this lane asked for."""
        start = self._starts[lane]
        assert start is not None, f"lane {lane} is used before a sequence entered it"
        return start.params

    def needs(self, lanes: Iterable[int]) -> Needs:
        """What these lanes need together."""
        together = Needs.NOTHING
        for needs in {self._needs[lane] for lane in lanes}:
            together |= needs
        return together

    def reason_against_graphs(self, lanes: Iterable[int]) -> str | None:
        """Why the logits of these lanes cannot be adjusted by graphs; None where they can."""
        for lane in self._with_long_lists.intersection(lanes):
            if len(self.params(lane).logit_bias or {}) > self.lists.bias.shape[1]:
                return f"a logit_bias of more than {self.lists.bias.shape[1]} tokens"
            return f"min_tokens with more than {self.lists.ending_ids.shape[1]} ending tokens"
        return None

    def temperatures(self, lanes: torch.Tensor) -> torch.Tensor:
        """[n], float64, of int64 `lanes` [n]."""
        return self.shares[lanes, TEMPERATURE]

    def filters(self, lanes: torch.Tensor) -> Filters:
        """top_k, top_p and min_p of int64 `lanes` [n]."""
        shares = self.shares[lanes]
        return Filters(self.top_k[lanes], shares[:, TOP_P], shares[:, MIN_P])

    def adjust(
        self, values: torch.Tensor, lanes: torch.Tensor, positions: torch.Tensor, *, in_graph: bool = False
    ) -> None:
        """Apply repetition, presence and frequency penalty, bias and the min_tokens mask, in this order, in place.

        Args:
            values: [n, more than vocab], float32 logits, -inf beyond the vocabulary
            lanes: [n], int64
            positions: [n], int64, of the token to be chosen
            in_graph: whether this is captured, so that only fixed memory may be read
        """
        self.usage.penalize(values, lanes)
        self.lists.apply(values, lanes, positions)
        if self._with_long_lists and not in_graph:
            self._long_lists.apply(values, lanes, positions)

    def _start_lists(self, start: LaneStart) -> Needs:
        bias, endings = start.params.logit_bias or {}, masked_endings(start, self.vocab_size)
        ends_from = len(start.prompt_token_ids) + start.params.min_tokens
        used, other = self.lists, self._long_lists
        self._with_long_lists.discard(start.lane)
        if not used.holds(bias, endings):
            used, other = other, used
            self._with_long_lists.add(start.lane)
        used.set(start.lane, bias, endings, ends_from)
        other.set(start.lane, {}, [], 0)
        return Needs.ADJUST if bias or endings else Needs.NOTHING

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        return self._upload(torch.tensor(list(values), dtype=torch.int64))


def _needs(start: LaneStart) -> Needs:
    """What a sequence needs, lists aside."""
    params, needs = start.params, Needs.NOTHING
    if not params.greedy:
        needs |= Needs.DRAW
        if params.top_k or params.top_p < 1.0 or params.min_p > 0.0:
            needs |= Needs.FILTER
    if start.params.has_penalties:
        needs |= Needs.ADJUST
    return needs if params.logprobs is None else needs | Needs.REPORT


def _last_token(start: LaneStart) -> int:
    return start.output_token_ids[-1] if start.output_token_ids else start.prompt_token_ids[-1]
