"""Lanes: what the device remembers of each sequence between steps.

A sequence keeps its lane, a fixed index, from `start` until the scheduler gives the lane to another; rows are
reordered from step to step, lanes never. The host knows what each lane asks for, so a step does only what its own lanes
need: with greedy lanes alone that is an argmax.

Penalties are kept as token histories, not as tables of counts per vocabulary entry: a history is shorter than a
vocabulary in nearly every load, and applying it reads only the logits of tokens that were used. Memory for it exists
once some lane asks for a penalty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.plan import LaneStart
from cascade_llm.runner.draw import Filters, draw_key
from cascade_llm.sampling_params import SamplingParams

__all__ = ["LaneState"]

TEMPERATURE, TOP_P, MIN_P, PRESENCE, FREQUENCY, REPETITION = range(6)
INITIAL_HISTORY_LEN = 1024


class LaneState:
    """Per-sequence device state, one entry per lane. Changed by `start` and `record` only."""

    def __init__(self, num_lanes: int, vocab_size: int, device: torch.device | str = "cpu") -> None:
        """vocab_size: columns of the logits, which may be more than the tokenizer has tokens."""
        self.num_lanes, self.vocab_size, self.device = num_lanes, vocab_size, torch.device(device)
        self.last_tokens = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        """[num_lanes], the token that a lane's next row reads when the plan leaves it to the lane"""
        self.draw_keys = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        """[num_lanes], see `draw_key`"""
        self._top_k = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        self._numbers = torch.zeros(num_lanes, 6, dtype=torch.float64, device=device)
        self._starts: list[LaneStart | None] = [None] * num_lanes
        self._history: torch.Tensor | None = None
        """[num_lanes, capacity], int64: prompt and generated tokens of lanes with a penalty"""
        self._history_lens = [0] * num_lanes
        self._repetition_lanes: set[int] = set()
        self._usage_lanes: set[int] = set()
        self._bias: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._ending: dict[int, torch.Tensor] = {}

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
        self._numbers[lanes] = torch.tensor(numbers, dtype=torch.float64).to(self.device)
        for start in starts:
            self._starts[start.lane] = start
            self._start_history(start)
            self._start_bias(start)
            self._start_ending(start)

    def record(self, lanes: Sequence[int], tokens: torch.Tensor) -> None:
        """Note sampled tokens [samples], int64, one per lane: the next input, and from now on used."""
        if not len(lanes):
            return
        self.last_tokens[self._index(lanes)] = tokens
        penalized = [i for i, lane in enumerate(lanes) if self._is_penalized(lane)]
        if not penalized:
            return
        noted = [lanes[i] for i in penalized]
        history = self._history_of(1 + max(self._history_lens[lane] for lane in noted))
        ends = self._index([self._history_lens[lane] for lane in noted])
        history[self._index(noted), ends] = tokens[self._index(penalized)]
        for lane in noted:
            self._history_lens[lane] += 1

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
        return self._is_penalized(lane) or lane in self._bias or lane in self._ending

    def adjust(self, logits: torch.Tensor, lanes: Sequence[int], positions: Sequence[int]) -> None:
        """Apply repetition, presence and frequency penalty, bias and the min_tokens mask, in this order, in place.

        Rows whose lanes ask for none of them are not touched.

        Args:
            logits: [n, at least vocab], float32
            lanes: [n]
            positions: [n], place of the token to be chosen
        """
        self._penalize_repetition(logits, lanes)
        self._penalize_usage(logits, lanes)
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

    def _is_penalized(self, lane: int) -> bool:
        return lane in self._repetition_lanes or lane in self._usage_lanes

    def _start_history(self, start: LaneStart) -> None:
        params = start.params
        _keep(self._repetition_lanes, start.lane, params.repetition_penalty != 1.0)
        _keep(self._usage_lanes, start.lane, params.presence_penalty != 0.0 or params.frequency_penalty != 0.0)
        if self._is_penalized(start.lane):
            tokens = [*start.prompt_token_ids, *start.output_token_ids]
            self._history_of(len(tokens))[start.lane, : len(tokens)] = self._index(tokens)
            self._history_lens[start.lane] = len(tokens)

    def _start_bias(self, start: LaneStart) -> None:
        self._bias.pop(start.lane, None)
        if start.params.logit_bias:
            bias = torch.tensor(list(start.params.logit_bias.values()), dtype=torch.float32).to(self.device)
            self._bias[start.lane] = self._index(list(start.params.logit_bias)), bias

    def _start_ending(self, start: LaneStart) -> None:
        self._ending.pop(start.lane, None)
        ending = sorted(token_id for token_id in start.ending_token_ids if token_id < self.vocab_size)
        if start.params.min_tokens and ending:
            self._ending[start.lane] = self._index(ending)

    def _masks_ending(self, lane: int, position: int) -> bool:
        if lane not in self._ending:
            return False
        start = self._start(lane)
        return position - len(start.prompt_token_ids) < start.params.min_tokens

    def _history_of(self, length: int) -> torch.Tensor:
        """The histories, with room for `length` tokens in each lane."""
        capacity = 0 if self._history is None else self._history.shape[1]
        if self._history is None or capacity < length:
            wider = torch.zeros(self.num_lanes, max(INITIAL_HISTORY_LEN, 2 * length), dtype=torch.int64)
            grown = wider.to(self.device)
            if self._history is not None:
                grown[:, :capacity] = self._history
            self._history = grown
        return self._history

    def _penalize_repetition(self, logits: torch.Tensor, lanes: Sequence[int]) -> None:
        rows = [row for row, lane in enumerate(lanes) if lane in self._repetition_lanes]
        if not rows:
            return
        begins, ends = [0] * len(rows), [self._history_lens[lanes[row]] for row in rows]
        used, _ = self._used(rows, lanes, begins, ends)
        where = self._index(rows)[:, None]
        penalty = self._numbers[self._index([lanes[row] for row in rows]), REPETITION].float()[:, None]
        chosen = logits[where, used]
        logits[where, used] = torch.where(chosen > 0, chosen / penalty, chosen * penalty)

    def _penalize_usage(self, logits: torch.Tensor, lanes: Sequence[int]) -> None:
        rows = [row for row, lane in enumerate(lanes) if lane in self._usage_lanes and self._output_len(lane)]
        if not rows:
            return
        ends = [self._history_lens[lanes[row]] for row in rows]
        begins = [end - self._output_len(lanes[row]) for row, end in zip(rows, ends, strict=True)]
        used, valid = self._used(rows, lanes, begins, ends)
        where = self._index(rows)[:, None]
        numbers = self._numbers[self._index([lanes[row] for row in rows])].float()
        logits[where, used] = logits[where, used] - numbers[:, PRESENCE, None]
        per_use = torch.where(valid, -numbers[:, FREQUENCY, None], 0.0)
        logits.index_put_((where.expand_as(used), used), per_use, accumulate=True)

    def _output_len(self, lane: int) -> int:
        return self._history_lens[lane] - len(self._start(lane).prompt_token_ids)

    def _used(
        self, rows: list[int], lanes: Sequence[int], begins: list[int], ends: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A span of each row's history, padded by repeating its first token.

        Repeats are harmless where a token's logit is computed from its old value: all write the same.

        Returns:
            token ids [rows, longest], int64; whether each is inside its span, bool
        """
        longest = max(end - begin for begin, end in zip(begins, ends, strict=True))
        first, length = self._index(begins)[:, None], (self._index(ends) - self._index(begins))[:, None]
        place = torch.arange(longest, device=self.device)
        valid = place < length
        lane_index = self._index([lanes[row] for row in rows])[:, None]
        return self._history_of(longest)[lane_index, first + place * valid], valid

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int64).to(self.device)


def _last_token(start: LaneStart) -> int:
    return start.output_token_ids[-1] if start.output_token_ids else start.prompt_token_ids[-1]


def _numbers(params: SamplingParams) -> tuple[float, ...]:
    """The columns TEMPERATURE to REPETITION."""
    return (
        params.temperature,
        params.top_p,
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        params.repetition_penalty,
    )


def _keep(lanes: set[int], lane: int, member: bool) -> None:
    """Make a lane a member of the set, or not."""
    if member:
        lanes.add(lane)
    else:
        lanes.discard(lane)
