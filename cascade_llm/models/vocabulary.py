"""Embedding and head by ranks: each has some rows of the vocabulary, and rank 0 gets the logits of all."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cascade_llm.device.ranks import Ranks
from cascade_llm.weights.format import MatrixSpec, WeightOptions

__all__ = ["VocabularyShares"]

UNIT = 64
"""Rows that stay together: whole blocks and tiles of every kernel."""


class VocabularyShares:
    """Which rows of the vocabulary each rank has."""

    def __init__(self, vocab_size: int, ranks: Ranks) -> None:
        unit = UNIT if vocab_size >= UNIT * ranks.count else 1
        self._ranks, self._vocab_size = ranks, vocab_size
        self._shares = [ranks.share_of(rank, vocab_size, unit) for rank in range(ranks.count)]
        self._longest = max(share.size for share in self._shares)

    def matrix(self, name: str, part: str, hidden_size: int, options: WeightOptions) -> MatrixSpec:
        """Of embedding or head [vocab_size, hidden_size]; `part`: its name in a checkpoint."""
        outputs = {} if self._ranks.count == 1 else {part: self._shares[self._ranks.index]}
        return MatrixSpec(name, hidden_size, {part: self._vocab_size}, options, outputs=outputs)

    def gathered(self, logits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """On rank 0 the logits of all, [n, vocab_size]; on others their own [n, part of the vocabulary].

        Args:
            logits: this rank's; parts of one size are exchanged, so they are padded
            out: [n, vocab_size], where those of all are written; default new memory
        """
        if self._ranks.count == 1:
            return logits
        parts = self._ranks.gather(F.pad(logits, (0, self._longest - logits.shape[1])).contiguous())
        if not self._ranks.is_first:
            return logits
        own = [part[:, : share.size] for part, share in zip(parts, self._shares, strict=True)]
        return torch.cat(own, dim=1, out=out) if out is not None else torch.cat(own, dim=1)
