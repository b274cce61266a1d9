"""GPTQ: words of codes along the inputs, zero points along the outputs, and the group of each input.

    qweight [in * bits / 32, out] int32     qzeros [groups, out * bits / 32] int32
    scales  [groups, out]                   g_idx  [in] int32, optional

Zero points are stored minus one, save in the format "gptq_v2".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cascade_llm.errors import CheckpointError
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

__all__ = ["GPTQ"]

INSTEAD = "choose a checkpoint in GPTQ of 4 or 8 bits"
INTEGERS = (torch.int32, torch.int64)


class GPTQ(MatrixFormat):
    """See the module."""

    method = "gptq"
    markers = ("qweight", "qzeros", "scales")
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """See `QuantizedFormat`."""
        self.bits, self.group_len = number_of(config, "bits"), number_of(config, "group_size")
        if self.bits not in (4, 8):
            raise unsupported(f"bits={self.bits}", INSTEAD)
        if self.group_len != -1 and self.group_len < 1:
            raise unsupported(f"group_size={self.group_len}", "group sizes are -1 or positive")
        stored_as = config.get("checkpoint_format") or "gptq"
        if stored_as not in ("gptq", "gptq_v2"):
            raise unsupported(f"checkpoint_format={stored_as!r}", "choose a checkpoint in 'gptq' or 'gptq_v2'")
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, Mapping):
            raise CheckpointError(f"config.json: quantization_config: dynamic is {dynamic!r}: it must be an object")
        changed = [name for name in dynamic if not name.startswith("-:")]
        if changed:
            raise unsupported(f"dynamic={changed[0]!r}", "choose a checkpoint with the same bits in all its layers")
        self.zero_offset = 1 if stored_as == "gptq" else 0
        self.is_symmetric = config.get("sym") is True
        self._ignored = names_of(config, "modules_to_not_convert")

    def is_ignored(self, name: str) -> bool:
        """See `QuantizedFormat`."""
        return is_listed(name, self._ignored)

    def grid(self, parts: MatrixParts) -> Grid:
        """See `QuantizedFormat`."""
        per_word = 32 // self.bits
        num_words, out = parts.matrix("qweight", (torch.int32,))
        num_inputs = num_words * per_word
        group_len = num_inputs if self.group_len == -1 else min(self.group_len, num_inputs)
        num_groups = -(-num_inputs // group_len)
        why = f", by bits={self.bits} and group_size={self.group_len} of quantization_config"
        scales = parts.scales("scales", (num_groups, out), why).t()
        packed = parts.tensor("qzeros", (torch.int32,), (num_groups, -(-out // per_word)), why)
        zeros = unpacked_words(packed, self.bits)[:, :out].t().short() + self.zero_offset
        if (zeros >= 1 << self.bits).any():
            raise parts.error("qzeros", f"has zero points of {1 << self.bits}, out of range for {self.bits} bits")
        unit, order, groups = self._groups(parts, num_inputs, group_len, num_groups)
        centred = self.is_symmetric and bool((zeros == 1 << (self.bits - 1)).all())
        return integer_grid(
            (out, num_inputs), self.bits, unit, scales[:, groups], None if centred else zeros[:, groups], order
        )

    def codes(self, parts: MatrixParts, rows: slice, inputs: slice) -> torch.Tensor:
        """See `MatrixFormat`."""
        words, own = words_of(inputs, 32 // self.bits)
        return unpacked_words(parts.tensor("qweight", (torch.int32,))[words, rows].t(), self.bits)[:, own]

    def _groups(
        self, parts: MatrixParts, num_inputs: int, group_len: int, num_groups: int
    ) -> tuple[int, torch.Tensor | None, torch.Tensor]:
        """The length of equal groups, the order of inputs in which they lie together, and the stored group of each."""
        unit, groups = groups_of(num_inputs, group_len)
        if "g_idx" not in parts:
            return unit, None, groups
        found = parts.tensor("g_idx", INTEGERS, (num_inputs,), f", by bits={self.bits} of quantization_config")
        return grouped(parts, "g_idx", found.long(), unit, groups, num_groups)


def grouped(
    parts: MatrixParts, suffix: str, found: torch.Tensor, unit: int, groups: torch.Tensor, num_groups: int
) -> tuple[int, torch.Tensor | None, torch.Tensor]:
    """As `GPTQ._groups`, of the int64 group `found` [in] of each input, where unordered groups would be `groups`."""
    low, high = (int(end) for end in found.aminmax())
    if low < 0 or high >= num_groups:
        raise parts.error(suffix, f"names group {low if low < 0 else high}, there are {num_groups}")
    if torch.equal(found, groups.repeat_interleave(unit)):
        return unit, None, groups
    order = torch.argsort(found, stable=True)
    ordered = found[order].view(-1, unit)
    if not (ordered == ordered[:, :1]).all():
        raise parts.error(suffix, f"makes groups that are no multiple of {unit} inputs")
    in_order = torch.equal(order, torch.arange(len(order)))
    return unit, None if in_order else order, ordered[:, 0]
