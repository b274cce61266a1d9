"""Token bitmasks: which tokens a sample may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["TokenMasks"]

WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """A row of bits per constrained sample, on the device of the logits."""

    bits: torch.Tensor
    """[m, ceil(vocab / 32)], int32; bit i of word w allows token 32 w + i"""
    rows: torch.Tensor
    """[samples], int64, the row of `bits` for each sample; -1 allows all"""

    def apply(self, values: torch.Tensor) -> None:
        """Set what is not allowed to -inf, in place.

        values: [samples, at least vocab], float32 logits
        """
        shifts = torch.arange(WORD_BITS, dtype=torch.int32, device=values.device)
        words = self.bits[self.rows.clamp(min=0)]
        hidden = (((words[:, :, None] >> shifts) & 1) == 0).flatten(1) & (self.rows >= 0)[:, None]
        length = min(hidden.shape[1], values.shape[1])
        values[:, :length].masked_fill_(hidden[:, :length], -torch.inf)
