"""What lanes do to their logits, in tables that CUDA graphs can read: counts of used tokens, lists of token ids."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from cascade_llm.plan import LaneStart

__all__ = ["TokenLists", "Upload", "UsageCounts", "masked_endings"]

Upload = Callable[[torch.Tensor], torch.Tensor]
"""Gives the device's copy of a host tensor."""

MOST_INT16_USES = 2**14 - 1
"""What an int16 counts beside the bit for the prompt."""


def masked_endings(start: LaneStart, vocab_size: int) -> list[int]:
    """The token ids that min_tokens hides from a sequence, ascending."""
    if not start.params.min_tokens:
        return []
    return sorted(token_id for token_id in start.ending_token_ids if token_id < vocab_size)


def _penalties(start: LaneStart) -> tuple[float, float, float]:
    """Presence, frequency, repetition."""
    return start.params.presence_penalty, start.params.frequency_penalty, start.params.repetition_penalty


class UsageCounts:
    """How often each lane has used each token, and its penalties.

    An entry is twice the token's uses in the output, plus one where the prompt has the token. Rows of lanes without
    penalties hold anything: their penalties change nothing.
    """

    def __init__(
        self, num_lanes: int, vocab_size: int, max_model_len: int, device: torch.device, upload: Upload
    ) -> None:
        self._shape, self._dtype, self._upload = (num_lanes, vocab_size), _dtype(max_model_len), upload
        self.penalties = torch.tensor([0.0, 0.0, 1.0]).repeat(num_lanes, 1).to(device)
        """[num_lanes, 3], float32: presence, frequency, repetition"""
        self.counts: torch.Tensor | None = None
        """[num_lanes, vocab], int16 or int32; None until a lane has a penalty, or `allocate`"""

    @staticmethod
    def bytes_needed(num_lanes: int, vocab_size: int, max_model_len: int) -> int:
        """What the counts take: 78 MB for 256 lanes of 152k tokens, twice that from 16k tokens of a sequence on."""
        return num_lanes * vocab_size * _dtype(max_model_len).itemsize

    def allocate(self) -> torch.Tensor:
        """The counts [num_lanes, vocab]; set aside by the first call."""
        if self.counts is None:
            self.counts = torch.zeros(self._shape, dtype=self._dtype, device=self.penalties.device)
        return self.counts

    def start(self, starts: Sequence[LaneStart]) -> None:
        """Set the rows of lanes that a sequence enters, behind the steps that used these lanes before."""
        lanes = self._upload(torch.tensor([start.lane for start in starts]))
        self.penalties[lanes] = self._upload(torch.tensor([_penalties(start) for start in starts]))
        for start in starts:
            if start.params.has_penalties:
                self._start_row(self.allocate()[start.lane], start)

    def note(self, lanes: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Count sampled tokens, int64 [n] each. A lane may stand there twice only if nobody reads it."""
        if self.counts is not None:
            self.counts.index_put_((lanes, token_ids), self.counts[lanes, token_ids] + 2)

    def penalize(self, values: torch.Tensor, lanes: torch.Tensor) -> None:
        """Apply repetition, presence and frequency penalty, in this order, in place.

        Args:
            values: [n, at least vocab], float32 logits
            lanes: [n], int64
        """
        if self.counts is None:
            return
        logits, uses = values[:, : self._shape[1]], self.counts[lanes]
        presence, frequency, repetition = self.penalties[lanes][:, :, None].unbind(1)
        factor = torch.where(uses > 0, repetition, 1.0)
        logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
        uses >>= 1
        logits.sub_(torch.where(uses > 0, presence, 0.0))
        logits.sub_(uses * frequency)

    def _start_row(self, row: torch.Tensor, start: LaneStart) -> None:
        prompt = torch.unique(torch.tensor(list(start.prompt_token_ids), dtype=torch.int64))
        row.zero_()
        row[self._upload(prompt)] = 1
        if start.output_token_ids:
            outputs = torch.tensor(list(start.output_token_ids), dtype=torch.int64)
            token_ids, uses = torch.unique(outputs, return_counts=True)
            row[self._upload(token_ids)] += self._upload(2 * uses.to(row.dtype))


def _dtype(max_model_len: int) -> torch.dtype:
    return torch.int16 if max_model_len <= MOST_INT16_USES else torch.int32


class TokenLists:
    """Per lane, a logit_bias and the endings that min_tokens hides.

    Lists are padded with the id that follows the vocabulary: logits that are adjusted have such a column, of -inf.
    """

    def __init__(
        self,
        num_lanes: int,
        vocab_size: int,
        device: torch.device,
        upload: Upload,
        capacities: tuple[int, int] | None = None,
    ) -> None:
        """capacities: ids in a bias and among the endings, never more; by default as many as some lane has needed."""
        self._vocab_size, self._upload, self._fixed = vocab_size, upload, capacities is not None
        bias_len, endings_len = capacities or (0, 0)
        self.bias_ids = torch.full((num_lanes, bias_len), vocab_size, dtype=torch.int64, device=device)
        self.bias = torch.zeros(num_lanes, bias_len, dtype=torch.float32, device=device)
        self.ending_ids = torch.full((num_lanes, endings_len), vocab_size, dtype=torch.int64, device=device)
        self.ends_from = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        """[num_lanes], the first position that an ending may take"""
        self._used: set[int] = set()

    def holds(self, bias: Collection[int], endings: Collection[int]) -> bool:
        """Whether there is room for such lists."""
        return not self._fixed or (len(bias) <= self.bias.shape[1] and len(endings) <= self.ending_ids.shape[1])

    def set(self, lane: int, bias: Mapping[int, float], endings: Sequence[int], ends_from: int) -> None:
        """Set the lists of a lane, whatever it had before."""
        if not bias and not endings and lane not in self._used:
            return
        if len(bias) > self.bias.shape[1]:
            self.bias_ids = _grown(self.bias_ids, len(bias), self._vocab_size)
            self.bias = _grown(self.bias, len(bias), 0.0)
        if len(endings) > self.ending_ids.shape[1]:
            self.ending_ids = _grown(self.ending_ids, len(endings), self._vocab_size)
        self._set_row(self.bias_ids, lane, list(bias), self._vocab_size)
        self._set_row(self.bias, lane, list(bias.values()), 0.0)
        self._set_row(self.ending_ids, lane, endings, self._vocab_size)
        self.ends_from[lane] = ends_from if endings else 0
        if bias or endings:
            self._used.add(lane)
        else:
            self._used.discard(lane)

    def apply(self, values: torch.Tensor, lanes: torch.Tensor, positions: torch.Tensor) -> None:
        """Add the bias, then hide the endings, in place.

        Args:
            values: [n, more than vocab], float32 logits
            lanes: [n], int64
            positions: [n], int64, of the token to be chosen
        """
        ids = self.bias_ids[lanes]
        values.scatter_(1, ids, values.gather(1, ids) + self.bias[lanes])
        ids = self.ending_ids[lanes]
        hidden = (positions < self.ends_from[lanes])[:, None]
        values.scatter_(1, ids, torch.where(hidden, -torch.inf, values.gather(1, ids)))

    def _set_row(self, table: torch.Tensor, lane: int, values: Sequence[float], padding: float) -> None:
        if table.shape[1]:
            padded = [*values, *[padding] * (table.shape[1] - len(values))]
            table[lane] = self._upload(torch.tensor(padded, dtype=table.dtype))


def _grown(table: torch.Tensor, length: int, padding: float) -> torch.Tensor:
    """A table with room for `length` columns or more."""
    grown = table.new_full((len(table), 1 << (length - 1).bit_length()), padding)
    grown[:, : table.shape[1]] = table
    return grown
