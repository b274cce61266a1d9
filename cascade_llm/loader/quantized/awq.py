"""AWQ as its "gemm" kernels take it: words of eight codes of 4 bits along the outputs, in an order of their own.

qweight [in, out / 8] int32     qzeros [groups, out / 8] int32     scales [groups, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cascade_llm.loader.quantized.format import (
    MatrixFormat,
    is_listed,
    names_of,
    number_of,
    unpacked_words,
    unsupported,
    words_of,
)
from cascade_llm.loader.quantized.grid import Grid, groups_of, integer_grid
from cascade_llm.loader.quantized.parts import MatrixParts

__all__ = ["AWQ"]

PER_WORD = 8
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Of outputs 0 to 7 in their word: even outputs fill the lower half."""


class AWQ(MatrixFormat):
    """See the module."""

    method = "awq"
    markers = ("qweight", "qzeros", "scales")
    suffixes = markers

    def __init__(self, config: Mapping[str, Any]) -> None:
        """See `QuantizedFormat`."""
        bits, self.group_len = number_of(config, "bits", "w_bit"), number_of(config, "group_size", "q_group_size")
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if bits != 4:
            raise unsupported(f"bits={bits}", "choose a checkpoint in AWQ of 4 bits")
        if version != "gemm":
            raise unsupported(f"version={version!r}", "choose a checkpoint that was saved as version 'gemm'")
        if self.group_len != -1 and self.group_len < 1:
            raise unsupported(f"group_size={self.group_len}", "group sizes are -1 or positive")
        self.has_zeros = config.get("zero_point", True) is not False
        self._ignored = names_of(config, "modules_to_not_convert")

    def is_ignored(self, name: str) -> bool:
        """See `QuantizedFormat`."""
        return is_listed(name, self._ignored)

    def grid(self, parts: MatrixParts) -> Grid:
        """See `QuantizedFormat`."""
        num_inputs, num_words = parts.matrix("qweight", (torch.int32,))
        out = num_words * PER_WORD
        group_len = num_inputs if self.group_len == -1 else min(self.group_len, num_inputs)
        num_groups = -(-num_inputs // group_len)
        why = f", by group_size={self.group_len} of quantization_config"
        scales = parts.scales("scales", (num_groups, out), why).t()
        unit, groups = groups_of(num_inputs, group_len)
        if not self.has_zeros and "qzeros" not in parts:
            return integer_grid((out, num_inputs), 4, unit, scales[:, groups], None)
        zeros = _unpacked(parts.tensor("qzeros", (torch.int32,), (num_groups, num_words), why)).t()
        return integer_grid((out, num_inputs), 4, unit, scales[:, groups], zeros[:, groups])

    def codes(self, parts: MatrixParts, rows: slice, inputs: slice) -> torch.Tensor:
        """See `MatrixFormat`."""
        words, own = words_of(rows, PER_WORD)
        return _unpacked(parts.tensor("qweight", (torch.int32,))[inputs, words])[:, own].t().contiguous()


def _unpacked(words: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, outputs] of int32 words [rows, outputs / 8]."""
    return unpacked_words(words, 4).view(len(words), -1, PER_WORD)[..., PLACES].flatten(1)
