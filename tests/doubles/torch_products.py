"""torch's CUDA products of quantized matrices in plain torch, by the checks that stand in their source.

Read in torch's `aten/src/ATen/native/cuda/int4mm.cu` and `ScaledBlas.cpp`. They are registered for the device on which
the doubles keep their memory, and for "meta", so that the package calls the same operators as on a GPU. The order of
the packed codes is that of the source, written here by what each lane of a tensor core holds.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.library import Library

from tests.doubles.planner import DoubleError

__all__ = ["cuda_products", "packed_words", "scaled_product", "unpacked_words"]

LANES, TILE_OUTPUTS, TILE_INPUTS = 32, 8, 16
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a lane's eight codes lies in which four bits of its word, from the lowest."""
BLOCK_LEN = 128


@contextmanager
def cuda_products() -> Iterator[None]:
    """What torch has for CUDA alone works inside on the CPU and on meta tensors."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a kernel of the CPU's is overridden
        for key in ("CPU", "Meta"):
            library.impl("_convert_weight_to_int4pack", packed_words, key, allow_override=True)
            library.impl("_weight_int4pack_mm", _int4_product, key, allow_override=True)
            library.impl("_scaled_mm.out", scaled_product, key, allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def packed_words(pairs: torch.Tensor, tiles_together: int) -> torch.Tensor:
    """int32 [outputs / 8, inputs / (16 tiles), 32, tiles / 2] of uint8 [outputs, inputs / 2], the even code above."""
    _demand(pairs.dim() == 2 and pairs.dtype == torch.uint8 and pairs.is_contiguous(), "uint8 rows", pairs)
    outputs, inputs = pairs.shape[0], 2 * pairs.shape[1]
    _demand(tiles_together in (2, 4, 8) and inputs % (tiles_together * TILE_INPUTS) == 0, "whole tiles", pairs)
    _demand(outputs % TILE_OUTPUTS == 0, "whole tiles of outputs", pairs)
    shape = outputs // TILE_OUTPUTS, inputs // (tiles_together * TILE_INPUTS), LANES, tiles_together // 2
    if pairs.is_meta:
        return pairs.new_empty(shape, dtype=torch.int32)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=-1).view(outputs, inputs)
    places = _places(outputs, inputs, tiles_together)
    nibbles = codes.flatten()[places].to(torch.int64)
    words = sum(nibbles[..., place] << (4 * index) for index, place in enumerate(NIBBLES))
    assert isinstance(words, torch.Tensor)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).view(shape)


def unpacked_words(words: torch.Tensor) -> torch.Tensor:
    """The codes, int64 [outputs, inputs], of words that `packed_words` made."""
    tiles_together = 2 * words.shape[3]
    outputs, inputs = TILE_OUTPUTS * words.shape[0], TILE_INPUTS * tiles_together * words.shape[1]
    places = _places(outputs, inputs, tiles_together)
    codes = torch.empty(outputs * inputs, dtype=torch.int64)
    for index, place in enumerate(NIBBLES):
        codes[places[..., place].flatten()] = (words.flatten().long() >> (4 * index)) & 15
    return codes.view(outputs, inputs)


@functools.cache
def _places(outputs: int, inputs: int, tiles_together: int) -> torch.Tensor:
    """Where in [outputs, inputs] the eight codes of each word come from: [words, 8].

    A lane t of a tile holds output t / 4, and of each of two tiles of inputs 2t' and 2t'+1, 2t'+8 and 2t'+9 with
    t' = t % 4.
    """
    shape = outputs // TILE_OUTPUTS, inputs // (tiles_together * TILE_INPUTS), LANES, tiles_together // 2
    tile, outer, lane, pair = (
        torch.arange(n).view([-1 if i == d else 1 for i in range(4)]) for d, n in enumerate(shape)
    )
    row = tile * TILE_OUTPUTS + lane // 4
    first = (outer * tiles_together + 2 * pair) * TILE_INPUTS + 2 * (lane % 4)
    steps = torch.tensor([0, 1, 8, 9, 16, 17, 24, 25])
    return ((row * inputs + first).expand(shape).unsqueeze(-1) + steps).view(-1, 8)


def _int4_product(x: torch.Tensor, words: torch.Tensor, group_len: int, grid: torch.Tensor) -> torch.Tensor:
    _demand(x.dim() == 2 and x.dtype == torch.bfloat16 and x.is_contiguous() and len(x) > 0, "rows of bfloat16", x)
    _demand(words.dim() == 4 and words.dtype == torch.int32 and words.is_contiguous(), "words", words)
    rows, inputs = x.shape
    outputs = TILE_OUTPUTS * words.shape[0]
    _demand(words.shape[1] * words.shape[3] * 2 * TILE_INPUTS == inputs and words.shape[2] == LANES, "tiles", words)
    _demand(group_len in (32, 64, 128, 256) and inputs % group_len == 0, f"groups of {group_len}", x)
    _demand(grid.dtype == torch.bfloat16 and grid.is_contiguous(), "a grid of bfloat16", grid)
    _demand(tuple(grid.shape) == (inputs // group_len, outputs, 2), "two numbers a group", grid)
    if x.is_meta:
        return x.new_empty(rows, outputs)
    codes = unpacked_words(words).sub_(8).double().view(outputs, -1, group_len)
    scales, offsets = grid.double().permute(2, 1, 0).unsqueeze(-1)
    weights = (codes * scales + offsets).bfloat16().flatten(1)
    return (x.float() @ weights.float().T).bfloat16()


def scaled_product(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
    *,
    out: torch.Tensor,
) -> torch.Tensor:
    """out [rows, outputs] = (a * scale_a) (b * scale_b), scales by row or by 128 inputs of both."""
    (rows, inputs), outputs = a.shape, b.shape[1]
    _demand(a.dtype == b.dtype == torch.float8_e4m3fn and len(a) > 0, "float8", a)
    _demand(a.is_contiguous() and b.t().is_contiguous(), "rows by columns", b)
    _demand(b.shape[0] == inputs and inputs % 16 == 0 and outputs % 16 == 0, "multiples of 16", b)
    _demand(scale_a.dtype == scale_b.dtype == torch.float32, "float32 scales", scale_a)
    _demand(bias is None and scale_result is None and out_dtype == out.dtype == torch.bfloat16, "bfloat16", out)
    _demand(tuple(out.shape) == (rows, outputs) and out.is_contiguous(), "the result's memory", out)
    by_row = _is_by_row(a, scale_a) and _is_by_row(b.t(), scale_b.t())
    by_block = _is_by_block(a, scale_a) and _is_by_block(b.t(), scale_b.t())
    _demand(by_row or (by_block and rows % 4 == 0), f"scales {tuple(scale_a.shape)} {scale_a.stride()}", scale_b)
    if a.is_meta:
        return out
    groups = scale_a.shape[1]
    left = a.double().view(rows, groups, -1) * scale_a.double().unsqueeze(-1)
    right = b.t().double().view(outputs, groups, -1) * scale_b.t().double().unsqueeze(-1)
    return out.copy_(left.flatten(1) @ right.flatten(1).T)


def _is_by_row(matrix: torch.Tensor, scales: torch.Tensor) -> bool:
    return tuple(scales.shape) == (len(matrix), 1) and scales.is_contiguous()


def _is_by_block(matrix: torch.Tensor, scales: torch.Tensor) -> bool:
    """A block's scales lie together for all rows; the stride of a single number or block means nothing."""
    rows, blocks = len(matrix), -(-matrix.shape[1] // BLOCK_LEN)
    strides = [stride for size, stride in zip(scales.shape, scales.stride(), strict=True) if size > 1]
    expected = [stride for size, stride in zip((rows, blocks), (1, rows), strict=True) if size > 1]
    return tuple(scales.shape) == (rows, blocks) and strides == expected


def _demand(holds: Any, what: str, tensor: torch.Tensor) -> None:
    if not holds:
        raise DoubleError(f"the kernel takes {what}, not {tuple(tensor.shape)} {tensor.dtype} {tensor.stride()}")
