"""FP8 as Qwen3 and DeepSeek ship it: numbers of 8 bits, and a scale for every block of 128 by 128, or for all of them.

    weight [out, in] float8_e4m3fn     weight_scale_inv [out / 128, in / 128], which weights are multiplied by

With one scale for a matrix it is a number, called weight_scale or weight_scale_inv.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.quantized.format import MatrixFormat, is_listed, names_of, unsupported
from cascade_llm.loader.quantized.grid import Grid, groups_of
from cascade_llm.loader.quantized.parts import MatrixParts
from cascade_llm.weights.codes import CodeLayout

__all__ = ["FP8", "block_shape", "float_grid"]

DTYPE = torch.float8_e4m3fn


class FP8(MatrixFormat):
    """See the module."""

    method = "fp8"
    markers = ("weight_scale_inv", "weight_scale")
    suffixes = ("weight", "weight_scale_inv", "weight_scale")
    unread = ("input_scale", "activation_scale")
    coded_types = ("F8_E4M3", "F8_E5M2")

    def __init__(self, config: Mapping[str, Any]) -> None:
        """See `QuantizedFormat`."""
        number = config.get("fmt") or "e4m3"
        if number not in ("e4m3", "float8_e4m3fn"):
            raise unsupported(f"fmt={number!r}", "choose a checkpoint in e4m3")
        block = config.get("weight_block_size")
        self.block = None if block is None else block_shape(block, "weight_block_size")
        self._ignored = names_of(config, "modules_to_not_convert", "ignored_layers")

    def is_ignored(self, name: str) -> bool:
        """See `QuantizedFormat`."""
        return is_listed(name, self._ignored)

    def grid(self, parts: MatrixParts) -> Grid:
        """See `QuantizedFormat`."""
        shape = parts.matrix("weight", (DTYPE,))
        suffix = "weight_scale" if "weight_scale" in parts else "weight_scale_inv"
        return float_grid(parts, suffix, shape, self.block or shape)

    def codes(self, parts: MatrixParts, rows: slice, inputs: slice) -> torch.Tensor:
        """See `MatrixFormat`."""
        return parts.tensor("weight", (DTYPE,))[rows, inputs]


def block_shape(value: object, field: str) -> tuple[int, int]:
    """Rows and columns of a block, as a field of the configuration has them."""
    if isinstance(value, list) and len(value) == 2 and all(type(side) is int and side > 0 for side in value):
        return value[0], value[1]
    raise CheckpointError(f"config.json: quantization_config: {field} is {value!r}: it must be two positive integers")


def float_grid(parts: MatrixParts, suffix: str, shape: tuple[int, int], block: tuple[int, int]) -> Grid:
    """Of floats of 8 bits [out, in] with a scale for each block; one for all may have any shape of one number."""
    rows, scales = block_scales(parts, suffix, shape, block)
    unit, groups = groups_of(shape[1], min(block[1], shape[1]))
    kind = "float16" if scales.dtype == torch.float16 else "float32"
    return Grid(shape, CodeLayout("float8_e4m3fn", 0, unit, kind), scales.float()[rows][:, groups])


def block_scales(
    parts: MatrixParts, suffix: str, shape: tuple[int, int], block: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The row of scales of each output, int64 [out], and the scales [rows, columns] of blocks."""
    counts = -(-shape[0] // block[0]), -(-shape[1] // block[1])
    found = parts.shape(suffix)
    wanted = found if counts == (1, 1) and found in ((), (1,)) else counts
    if counts[1] == 1 and found == (counts[0],):
        wanted = found
    why = f": blocks are {block[0]} by {block[1]}, by quantization_config"
    scales = parts.scales(suffix, wanted, why).reshape(counts)
    return torch.arange(shape[0]) // block[0], scales
