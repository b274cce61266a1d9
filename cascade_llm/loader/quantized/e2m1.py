"""Numbers of 4 bits (E2M1) as NVFP4 and MXFP4 of safetensors hold them: [out, in / 2] bytes of two neighbouring inputs,
the lower half first, and a scale for each group of inputs.

    NVFP4    float8_e4m3fn [out, in / 16], and a float32 for the matrix, which all of them are multiplied by
    MXFP4    uint8 [out, in / 32], exponents with 127 added

Formats: NVIDIA's documentation of NVFP4, and OCP Microscaling 1.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from cascade_llm.loader.gguf_codes import MXFP4_VALUES
from cascade_llm.loader.quantized.format import words_of
from cascade_llm.loader.quantized.grid import Grid, unpaired
from cascade_llm.loader.quantized.parts import MatrixParts
from cascade_llm.weights.codes import CodeLayout

__all__ = [
    "E2M1",
    "MXFP4_LEN",
    "NVFP4_LEN",
    "e2m1_codes",
    "exponent_scales",
    "mxfp4_grid",
    "nvfp4_grid",
    "scales_of_exponents",
]

E2M1 = CodeLayout("u4", 0, 32, "float32", values=MXFP4_VALUES)
NVFP4_LEN, MXFP4_LEN = 16, 32
"""Inputs that share a scale."""
BIAS_OF_HALVES = 128
"""Of an exponent: the table's values are twice the numbers."""
NAN_SCALE = 255
BYTES = (torch.uint8,)


def nvfp4_grid(parts: MatrixParts, packed: str, scales: str, factor: torch.Tensor, factor_name: str) -> Grid:
    """Of a matrix [out, in].

    Args:
        parts: of the matrix
        packed: the suffix of its codes
        scales: the suffix of the scales of its groups
        factor: float64 [1], which the scales are multiplied by; in 64 bits a reciprocal gives what a division gives
        factor_name: the suffix of that
    """
    shape = _shape(parts, packed, NVFP4_LEN)
    found = parts.scales_or_zeros(scales, (torch.float8_e4m3fn,), (shape[0], shape[1] // NVFP4_LEN), _why(NVFP4_LEN))
    numbers = (found.double() * factor).float() / 2
    if not numbers.isfinite().all():
        raise parts.error(factor_name, "makes scales that are not finite")
    return Grid(shape, replace(E2M1, group_len=NVFP4_LEN), numbers)


def mxfp4_grid(parts: MatrixParts, packed: str, scales: str) -> Grid:
    """As `nvfp4_grid`, of a matrix whose scales are exponents."""
    shape = _shape(parts, packed, MXFP4_LEN)
    found = exponent_scales(parts, scales, (shape[0], shape[1] // MXFP4_LEN), _why(MXFP4_LEN))
    return Grid(shape, E2M1, scales_of_exponents(found))


def e2m1_codes(parts: MatrixParts, packed: str, rows: slice, inputs: slice) -> torch.Tensor:
    """See `MatrixFormat.codes`."""
    pairs, own = words_of(inputs, 2)
    return unpaired(parts.tensor(packed, BYTES)[rows, pairs])[:, own]


def exponent_scales(parts: MatrixParts, suffix: str, shape: Sequence[int], why: str) -> torch.Tensor:
    """uint8 [*shape], as stored; none of them may be NaN."""
    found = parts.tensor(suffix, BYTES, shape, why)
    if (found == NAN_SCALE).any():
        raise parts.error(suffix, "has scales that are no numbers")
    return found


def scales_of_exponents(stored: torch.Tensor) -> torch.Tensor:
    """Float32 scales of `E2M1`."""
    return torch.exp2(stored.float() - BIAS_OF_HALVES)


def _shape(parts: MatrixParts, packed: str, group_len: int) -> tuple[int, int]:
    out, num_bytes = parts.matrix(packed, BYTES)
    if 2 * num_bytes % group_len:
        raise parts.error(packed, f"has {2 * num_bytes} inputs, which are no groups of {group_len}")
    return out, 2 * num_bytes


def _why(group_len: int) -> str:
    return f": {group_len} inputs share a scale"
