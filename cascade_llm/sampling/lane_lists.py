"""Per-lane lists of token ids in fixed device memory, as CUDA graphs read them: logit_bias, and min_tokens' endings.

A list has a capacity, and is padded by repeating its first entry: repeats of an id write the same value, so no order of
writes matters. A lane without a list holds entries that change nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from cascade_llm.plan import LaneStart
from cascade_llm.sampling.token_usage import Upload

__all__ = ["BIAS_CAPACITY", "ENDING_CAPACITY", "LaneLists", "has_lists", "masked_endings"]

BIAS_CAPACITY = 512
ENDING_CAPACITY = 64


def masked_endings(start: LaneStart, vocab_size: int) -> list[int]:
    """The token ids that min_tokens hides from a sequence, ascending."""
    if not start.params.min_tokens:
        return []
    return sorted(token_id for token_id in start.ending_token_ids if token_id < vocab_size)


def has_lists(start: LaneStart, vocab_size: int) -> bool:
    """Whether a sequence has a bias or hides its endings."""
    return bool(start.params.logit_bias or masked_endings(start, vocab_size))


class LaneLists:
    """The lists of every lane."""

    def __init__(self, num_lanes: int, vocab_size: int, device: torch.device, upload: Upload) -> None:
        self._vocab_size, self._upload = vocab_size, upload
        self._bias_ids = torch.zeros(num_lanes, BIAS_CAPACITY, dtype=torch.int64, device=device)
        self._bias = torch.zeros(num_lanes, BIAS_CAPACITY, dtype=torch.float32, device=device)
        self._ending_ids = torch.zeros(num_lanes, ENDING_CAPACITY, dtype=torch.int64, device=device)
        self._ends_from = torch.zeros(num_lanes, dtype=torch.int64, device=device)
        """[num_lanes], the first position that an ending token may take"""
        self._used: set[int] = set()

    def start(self, starts: Iterable[LaneStart]) -> None:
        """Set the lists of sequences that enter lanes; longer ones are neither set nor read."""
        for start in starts:
            lists = has_lists(start, self._vocab_size)
            if lists or start.lane in self._used:
                self._set(start)
            if lists:
                self._used.add(start.lane)
            else:
                self._used.discard(start.lane)

    def apply(self, logits: torch.Tensor, lanes: torch.Tensor, positions: torch.Tensor) -> None:
        """Add the bias, then hide the endings, in place.

        Args:
            logits: [n, at least vocab], float32
            lanes: [n], int64
            positions: [n], int64, place of the token to be chosen
        """
        token_ids = self._bias_ids[lanes]
        logits.scatter_(1, token_ids, logits.gather(1, token_ids) + self._bias[lanes])
        endings = self._ending_ids[lanes]
        hidden = (positions < self._ends_from[lanes])[:, None]
        logits.scatter_(1, endings, torch.where(hidden, -torch.inf, logits.gather(1, endings)))

    def _set(self, start: LaneStart) -> None:
        bias, endings = start.params.logit_bias or {}, masked_endings(start, self._vocab_size)
        if len(bias) <= BIAS_CAPACITY:
            self._bias_ids[start.lane] = self._upload(_padded(list(bias), BIAS_CAPACITY, torch.int64))
            self._bias[start.lane] = self._upload(_padded(list(bias.values()), BIAS_CAPACITY, torch.float32))
        if len(endings) <= ENDING_CAPACITY:
            self._ending_ids[start.lane] = self._upload(_padded(endings, ENDING_CAPACITY, torch.int64))
            self._ends_from[start.lane] = len(start.prompt_token_ids) + start.params.min_tokens if endings else 0


def _padded(values: Sequence[float], length: int, dtype: torch.dtype) -> torch.Tensor:
    first = values[0] if values else 0
    return torch.tensor([*values, *[first] * (length - len(values))], dtype=dtype)
