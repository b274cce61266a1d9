"""Lanes: what the device remembers of each sequence between steps.

A sequence keeps its lane, a fixed index, from `start` until the scheduler gives the lane to another; rows are
reordered from step to step, lanes never. The host knows what each lane asks for, so a step does only what its own lanes
need: with greedy lanes alone that is an argmax.

Which tokens a sequence has used is remembered by a `TokenUsage`, for the lanes whose penalties ask for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.plan import LaneStart
from cascade_llm.sampling.draw import Filters, draw_key
from cascade_llm.sampling.lane_lists import masked_endings
from cascade_llm.sampling.token_usage import TokenHistories, TokenUsage, Upload
from cascade_llm.sampling_params import SamplingParams

__all__ = ["NO_TOKEN", "LaneState"]

NO_TOKEN = -1
"""Smaller than every token id: of two sources of which one has a token, the larger is it."""
TEMPERATURE, TOP_P, MIN_P = range(3)


class LaneState:
    """Per-sequence device state, one entry per lane. Changed by `start` and `record` only."""

    def __init__(
        self,
        num_lanes: int,
        vocab_size: int,
        device: torch.device | str = "cpu",
        *,
        usage: TokenUsage | None = None,
        upload: Upload | None = None,
    ) -> None:
        """Set memory aside.

        Args:
            num_lanes: how many sequences run at once
            vocab_size: columns of the logits, which may be more than the tokenizer has tokens
            device: where the state lies
            usage: of these lanes; default token histories
            upload: brings host tensors to the device; the default waits until they are there
        """
        self.num_lanes, self.vocab_size, self.device = num_lanes, vocab_size, torch.device(device)
        self.last_tokens = torch.zeros(num_lanes + 1, dtype=torch.int64, device=device)
        """[num_lanes + 1], what a lane's next row reads when the plan leaves its token to the lane; see `no_lane`"""
        self.last_tokens[self.no_lane] = NO_TOKEN
        self.draw_keys = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        """[num_lanes], see `draw_key`"""
        self._top_k = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(num_lanes, 3, dtype=torch.float64, device=device)
        self._upload: Upload = upload or (lambda values: values.to(self.device))
        self.usage: TokenUsage = usage or TokenHistories(num_lanes, self._upload)
        self._starts: list[LaneStart | None] = [None] * num_lanes
        self._bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._ending: dict[int, torch.Tensor] = {}

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
        self._top_k[lanes] = self._index([start.params.top_k or self.vocab_size for start in starts])
        numbers = [_numbers(start.params) for start in starts]
        self._numbers[lanes] = self._upload(torch.tensor(numbers, dtype=torch.float64))
        self.usage.start(starts)
        for start in starts:
            self._starts[start.lane] = start
            self._start_bias(start)
            self._start_ending(start)

    def record(self, lanes: Sequence[int], tokens: torch.Tensor) -> None:
        """Note sampled tokens [samples], int64, one per lane: the next input, and from now on used."""
        if not len(lanes):
            return
        self.last_tokens[self._index(lanes)] = tokens
        self.usage.record(lanes, tokens)

    def params(self, lane: int) -> SamplingParams:
        """What the sequence in this lane asked for."""
        return self._start(lane).params

    def temperatures(self, lanes: torch.Tensor) -> torch.Tensor:
        """[n], float64, of int64 `lanes` [n]."""
        return self._numbers[lanes, TEMPERATURE]

    def filters(self, lanes: torch.Tensor) -> Filters:
        """top_k, top_p and min_p of int64 `lanes` [n]."""
        numbers = self._numbers[lanes]
        return Filters(self._top_k[lanes], numbers[:, TOP_P], numbers[:, MIN_P])

    def adjusts(self, lane: int) -> bool:
        """Whether `adjust` may change the logits of this lane."""
        return self.usage.penalizes(lane) or lane in self._bias or lane in self._ending

    def adjust(self, logits: torch.Tensor, lanes: Sequence[int], positions: Sequence[int]) -> None:
        """Apply repetition, presence and frequency penalty, bias and the min_tokens mask, in this order, in place.

        Rows whose lanes ask for none of them are not touched.

        Args:
            logits: [n, at least vocab], float32
            lanes: [n]
            positions: [n], place of the token to be chosen
        """
        self.usage.penalize(logits, lanes)
        for row, lane in enumerate(lanes):
            if lane in self._bias:
                token_ids, bias = self._bias[lane]
                logits[row, token_ids] += bias
            if self._masks_ending(lane, positions[row]):
                logits[row, self._ending[lane]] = -torch.inf

    def _start(self, lane: int) -> LaneStart:
        start = self._starts[lane]
        assert start is not None, f"lane {lane} is used before a sequence entered it"
        return start

    def _start_bias(self, start: LaneStart) -> None:
        self._bias.pop(start.lane, None)
        if start.params.logit_bias:
            bias = torch.tensor(list(start.params.logit_bias.values()), dtype=torch.float32)
            self._bias[start.lane] = self._index(list(start.params.logit_bias)), self._upload(bias)

    def _start_ending(self, start: LaneStart) -> None:
        self._ending.pop(start.lane, None)
        if ending := masked_endings(start, self.vocab_size):
            self._ending[start.lane] = self._index(ending)

    def _masks_ending(self, lane: int, position: int) -> bool:
        if lane not in self._ending:
            return False
        start = self._start(lane)
        return position - len(start.prompt_token_ids) < start.params.min_tokens

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        return self._upload(torch.tensor(list(values), dtype=torch.int64))


def _last_token(start: LaneStart) -> int:
    return start.output_token_ids[-1] if start.output_token_ids else start.prompt_token_ids[-1]


def _numbers(params: SamplingParams) -> tuple[float, ...]:
    """The columns TEMPERATURE to MIN_P."""
    return params.temperature, params.top_p, params.min_p
