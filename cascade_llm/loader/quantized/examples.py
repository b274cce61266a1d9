"""A small matrix of each kind of quantized safetensors, so that what serves them can be asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from cascade_llm.loader.quantized.e2m1 import E2M1, MXFP4_LEN, NVFP4_LEN
from cascade_llm.loader.quantized.fp8 import DTYPE
from cascade_llm.loader.quantized.grid import Grid, integer_grid, stored_matrix
from cascade_llm.weights.codes import CodeLayout
from cascade_llm.weights.format import StoredTensor

__all__ = ["quantized_examples"]

GROUP_LEN = 128
"""The most usual one."""
NF4_LEN = 64
NF4 = CodeLayout("u4", 0, NF4_LEN, "float32", values=tuple(place / 15 for place in range(-7, 9)))
"""With a table of fractions, as NF4 has one."""
SCALE = 0.01


def quantized_examples(rows: int, inputs: int) -> Iterator[tuple[str, float, StoredTensor]]:
    """What it is called, the bits of a weight in its file, and a matrix [rows, inputs], a multiple of 128 inputs."""
    yield "GPTQ-4", 4 + (16 + 4) / GROUP_LEN, _integers(rows, inputs, 4, GROUP_LEN, torch.float16, zero=7)
    yield "GPTQ-8", 8 + (16 + 8) / GROUP_LEN, _integers(rows, inputs, 8, GROUP_LEN, torch.float16, zero=7)
    yield "AWQ-4", 4 + (16 + 4) / GROUP_LEN, _integers(rows, inputs, 4, GROUP_LEN, torch.float16, zero=7)
    yield "W4A16", 4 + 16 / GROUP_LEN, _integers(rows, inputs, 4, GROUP_LEN, torch.bfloat16)
    yield "W8A8", 8 + 16 / inputs, _integers(rows, inputs, 8, inputs, torch.bfloat16)
    layout = CodeLayout("float8_e4m3fn", 0, GROUP_LEN, "float32")
    grid = Grid((rows, inputs), layout, torch.full((rows, inputs // GROUP_LEN), SCALE))
    yield "FP8", 8 + 32 / GROUP_LEN**2, _ones(grid, DTYPE)
    yield "NVFP4", 4 + 8 / NVFP4_LEN, _table(rows, inputs, replace(E2M1, group_len=NVFP4_LEN))
    yield "MXFP4", 4 + 8 / MXFP4_LEN, _table(rows, inputs, E2M1)
    yield "bitsandbytes NF4", 4 + 32 / NF4_LEN, _table(rows, inputs, NF4)
    yield "bitsandbytes int8", 8 + 32 / inputs, _integers(rows, inputs, 8, inputs, torch.float32)


def _integers(
    rows: int, inputs: int, bits: int, group_len: int, dtype: torch.dtype, zero: int | None = None
) -> StoredTensor:
    """Codes of 1, which are not in the middle."""
    scales = torch.full((rows, inputs // group_len), SCALE, dtype=dtype)
    zeros = None if zero is None else torch.full_like(scales, zero)
    return _ones(integer_grid((rows, inputs), bits, group_len, scales, zeros), torch.uint8)


def _table(rows: int, inputs: int, layout: CodeLayout) -> StoredTensor:
    assert layout.group_len is not None
    return _ones(Grid((rows, inputs), layout, torch.full((rows, inputs // layout.group_len), SCALE)), torch.uint8)


def _ones(grid: Grid, dtype: torch.dtype) -> StoredTensor:
    ones = torch.ones(grid.shape).to(dtype)
    return stored_matrix(grid.layout.code, grid, lambda some, part: ones[some, part])
