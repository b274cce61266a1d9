"""Which tokens a lane's sequence has used, and what its penalties make of that.

Two ways to remember, with one result: histories of tokens, for steps that the host walks through, and a table of counts
per vocabulary entry, which a CUDA graph can read and update without knowing how long a sequence is. They differ by
float32 rounding: a frequency penalty is subtracted use by use from the one, times the number of uses from the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch

from cascade_llm.plan import LaneStart

__all__ = ["TokenHistories", "TokenUsage", "Upload", "UsageTable", "is_penalized"]

Upload = Callable[[torch.Tensor], torch.Tensor]
"""Gives the device's copy of a host tensor."""

INITIAL_HISTORY_LEN = 1024
MOST_INT16_USES = 2**14 - 1
"""What an int16 counts beside the bit for the prompt."""


def is_penalized(start: LaneStart) -> bool:
    """Whether a sequence's penalties change any logit."""
    params = start.params
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class TokenUsage(ABC):
    """The used tokens of each lane, and its penalties."""

    @abstractmethod
    def start(self, starts: Sequence[LaneStart]) -> None:
        """Forget what these lanes held, and begin with the prompt and output of the sequences that enter them."""

    @abstractmethod
    def record(self, lanes: Sequence[int], tokens: torch.Tensor) -> None:
        """Note sampled tokens [samples], int64, one per lane, as used from now on."""

    @abstractmethod
    def penalizes(self, lane: int) -> bool:
        """Whether `penalize` may change the logits of this lane."""

    @abstractmethod
    def penalize(self, logits: torch.Tensor, lanes: Sequence[int]) -> None:
        """Apply repetition, presence and frequency penalty, in this order, in place.

        Args:
            logits: [n, at least vocab], float32
            lanes: [n]; rows whose lanes ask for no penalty are not changed
        """


class TokenHistories(TokenUsage):
    """Prompt and generated tokens of lanes with a penalty, in order.

    A history is shorter than a vocabulary in nearly every load, and applying it reads only the logits of tokens that
    were used. Memory exists once some lane asks for a penalty.
    """

    def __init__(self, num_lanes: int, upload: Upload) -> None:
        self._num_lanes, self._upload = num_lanes, upload
        self._tokens: torch.Tensor | None = None
        """[num_lanes, capacity], int64"""
        self._lens, self._prompt_lens = [0] * num_lanes, [0] * num_lanes
        self._penalties = [(0.0, 0.0, 1.0)] * num_lanes

    def start(self, starts: Sequence[LaneStart]) -> None:
        """See `TokenUsage`."""
        for start in starts:
            lane = start.lane
            self._penalties[lane] = _penalties(start)
            if is_penalized(start):
                tokens = [*start.prompt_token_ids, *start.output_token_ids]
                self._with_room(len(tokens))[lane, : len(tokens)] = self._index(tokens)
                self._lens[lane], self._prompt_lens[lane] = len(tokens), len(start.prompt_token_ids)

    def record(self, lanes: Sequence[int], tokens: torch.Tensor) -> None:
        """See `TokenUsage`."""
        penalized = [i for i, lane in enumerate(lanes) if self.penalizes(lane)]
        if not penalized:
            return
        noted = [lanes[i] for i in penalized]
        history = self._with_room(1 + max(self._lens[lane] for lane in noted))
        ends = self._index([self._lens[lane] for lane in noted])
        history[self._index(noted), ends] = tokens[self._index(penalized)]
        for lane in noted:
            self._lens[lane] += 1

    def penalizes(self, lane: int) -> bool:
        """See `TokenUsage`."""
        return self._penalties[lane] != (0.0, 0.0, 1.0)

    def penalize(self, logits: torch.Tensor, lanes: Sequence[int]) -> None:
        """See `TokenUsage`."""
        self._penalize_repetition(logits, lanes)
        self._penalize_uses(logits, lanes)

    def _penalize_repetition(self, logits: torch.Tensor, lanes: Sequence[int]) -> None:
        rows = [row for row, lane in enumerate(lanes) if self._penalties[lane][2] != 1.0]
        if not rows:
            return
        begins, ends = [0] * len(rows), [self._lens[lanes[row]] for row in rows]
        used, _ = self._used(rows, lanes, begins, ends)
        where = self._index(rows)[:, None]
        penalty = self._penalties_of([lanes[row] for row in rows])[:, 2, None]
        logits[where, used] = _less_likely(logits[where, used], penalty)

    def _penalize_uses(self, logits: torch.Tensor, lanes: Sequence[int]) -> None:
        asking = [row for row, lane in enumerate(lanes) if self._penalties[lane][:2] != (0.0, 0.0)]
        rows = [row for row in asking if self._lens[lanes[row]] > self._prompt_lens[lanes[row]]]
        if not rows:
            return
        ends, begins = [self._lens[lanes[row]] for row in rows], [self._prompt_lens[lanes[row]] for row in rows]
        used, valid = self._used(rows, lanes, begins, ends)
        where = self._index(rows)[:, None]
        penalties = self._penalties_of([lanes[row] for row in rows])
        logits[where, used] = logits[where, used] - penalties[:, 0, None]
        per_use = torch.where(valid, -penalties[:, 1, None], 0.0)
        logits.index_put_((where.expand_as(used), used), per_use, accumulate=True)

    def _penalties_of(self, lanes: list[int]) -> torch.Tensor:
        return self._upload(torch.tensor([self._penalties[lane] for lane in lanes], dtype=torch.float32))

    def _used(
        self, rows: list[int], lanes: Sequence[int], begins: list[int], ends: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A span of each row's history, padded by repeating its first token.

        Repeats are harmless where a token's logit is computed from its old value: all write the same.

        Returns:
            token ids [rows, longest], int64; whether each is inside its span, bool
        """
        longest = max(end - begin for begin, end in zip(begins, ends, strict=True))
        first = self._index(begins)[:, None]
        length = self._index(ends)[:, None] - first
        history = self._with_room(longest)
        place = torch.arange(longest, device=history.device)
        valid = place < length
        lane_index = self._index([lanes[row] for row in rows])[:, None]
        return history[lane_index, first + place * valid], valid

    def _with_room(self, length: int) -> torch.Tensor:
        """The histories, with room for `length` tokens in each lane."""
        capacity = 0 if self._tokens is None else self._tokens.shape[1]
        if self._tokens is None or capacity < length:
            grown = self._upload(torch.zeros(self._num_lanes, max(INITIAL_HISTORY_LEN, 2 * length), dtype=torch.int64))
            if self._tokens is not None:
                grown[:, :capacity] = self._tokens
            self._tokens = grown
        return self._tokens

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        return self._upload(torch.tensor(list(values), dtype=torch.int64))


class UsageTable(TokenUsage):
    """How often each lane used each token of the vocabulary, in fixed device memory.

    An entry is twice the number of uses in the output, plus 1 where the prompt has the token. Lanes without penalties
    hold anything: all that is read of them is multiplied by nothing.
    """

    def __init__(
        self, num_lanes: int, vocab_size: int, max_model_len: int, device: torch.device, upload: Upload
    ) -> None:
        self._vocab_size, self._upload = vocab_size, upload
        dtype = _table_dtype(max_model_len)
        self._table = torch.zeros(num_lanes, vocab_size, dtype=dtype, device=device)
        self._penalties = torch.tensor([0.0, 0.0, 1.0]).repeat(num_lanes, 1).to(device)
        """[num_lanes, 3], float32: presence, frequency, repetition"""
        self._penalized: set[int] = set()

    @staticmethod
    def bytes_needed(num_lanes: int, vocab_size: int, max_model_len: int) -> int:
        """What a table takes: 78 MB for 256 lanes of 152k tokens, twice that from 16k tokens of a sequence on."""
        return num_lanes * vocab_size * _table_dtype(max_model_len).itemsize

    @property
    def num_bytes(self) -> int:
        """What this table takes."""
        return self._table.nbytes

    def start(self, starts: Sequence[LaneStart]) -> None:
        """See `TokenUsage`. Queued behind the steps that used these lanes before, late rows of ended sequences among
        them."""
        if not starts:
            return
        lanes = self._upload(torch.tensor([start.lane for start in starts]))
        self._penalties[lanes] = self._upload(torch.tensor([_penalties(start) for start in starts]))
        for start in starts:
            self._penalized.discard(start.lane)
            if is_penalized(start):
                self._penalized.add(start.lane)
                self._start_row(start)

    def record(self, lanes: Sequence[int], tokens: torch.Tensor) -> None:
        """See `TokenUsage`."""
        if any(map(self.penalizes, lanes)):
            self.note(self._upload(torch.tensor(list(lanes))), tokens)

    def penalizes(self, lane: int) -> bool:
        """See `TokenUsage`."""
        return lane in self._penalized

    def penalize(self, logits: torch.Tensor, lanes: Sequence[int]) -> None:
        """See `TokenUsage`."""
        if any(map(self.penalizes, lanes)):
            self.penalize_rows(logits, self._upload(torch.tensor(list(lanes))))

    def penalize_rows(self, logits: torch.Tensor, lanes: torch.Tensor) -> None:
        """`penalize` without the host: `lanes` [n], int64, on the device."""
        values = logits[:, : self._vocab_size]
        uses, penalties = self._table[lanes], self._penalties[lanes]
        presence, frequency, repetition = penalties[:, :, None].unbind(1)
        values.copy_(_less_likely(values, torch.where(uses > 0, repetition, 1.0)))
        uses >>= 1
        values.sub_(torch.where(uses > 0, presence, 0.0))
        values.sub_(uses * frequency)

    def note(self, lanes: torch.Tensor, tokens: torch.Tensor) -> None:
        """`record` without the host: int64 [n] each. A lane may stand there twice only if nobody reads it."""
        self._table.index_put_((lanes, tokens), self._table[lanes, tokens] + 2)

    def _start_row(self, start: LaneStart) -> None:
        prompt = torch.unique(torch.tensor(list(start.prompt_token_ids), dtype=torch.int64))
        row = self._table[start.lane]
        row.zero_()
        row[self._upload(prompt)] = 1
        if start.output_token_ids:
            outputs = torch.tensor(list(start.output_token_ids), dtype=torch.int64)
            tokens, uses = torch.unique(outputs, return_counts=True)
            row[self._upload(tokens)] += self._upload(2 * uses.to(row.dtype))


def _less_likely(logits: torch.Tensor, repetition: torch.Tensor) -> torch.Tensor:
    return torch.where(logits > 0, logits / repetition, logits * repetition)


def _penalties(start: LaneStart) -> tuple[float, float, float]:
    """Presence, frequency, repetition."""
    return start.params.presence_penalty, start.params.frequency_penalty, start.params.repetition_penalty


def _table_dtype(max_model_len: int) -> torch.dtype:
    return torch.int16 if max_model_len <= MOST_INT16_USES else torch.int32
