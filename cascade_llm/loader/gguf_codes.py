"""GGUF's block types as codes, exact to the bit; the `gguf` package's own values are the independent twin.

Format: ggml-common.h (the blocks) and ggml-quants.c (the order of the bits) of https://github.com/ggml-org/ggml. A row
is a run of blocks; each function takes blocks [rows, blocks of a row, bytes of a block] and gives the codes in order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cascade_llm.weights.codes import CodeLayout, Codes

__all__ = ["CODED_TYPES", "codes_of"]

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MXFP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of e2m1; the scale is halved."""

Numbers = tuple[torch.Tensor | None, ...]
"""Codes [rows, blocks, codes of a block], then scales, minima, sub-scales and sub-minima of each block, as in `Codes`;
what is not there is None or left out."""


@dataclass(frozen=True)
class _Type:
    layout: CodeLayout
    unpack: Callable[[torch.Tensor], Numbers]


def codes_of(block_type: GGMLQuantizationType, data: torch.Tensor) -> Codes:
    """The codes of uint8 `data` [rows, bytes of a row], of a type in `CODED_TYPES`."""
    block_bytes = GGML_QUANT_SIZES[block_type][1]
    kind = CODED_TYPES[block_type]
    codes, *numbers = kind.unpack(data.view(len(data), -1, block_bytes))
    assert codes is not None
    return Codes(kind.layout, codes.flatten(1), *(None if n is None else n.flatten(1) for n in numbers))


def _float16(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The number at byte `at` of each block, [rows, blocks, 1] float16."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes -> [..., 2 n]: the low halves of all, then the high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """[..., n] bytes -> [..., 8 n] of 0 and 1, from the lowest bit of each byte."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (packed.unsqueeze(-1) >> shifts & 1).flatten(-2)


def _q4_0(blocks: torch.Tensor) -> Numbers:
    return _nibbles(blocks[..., 2:]), _float16(blocks, 0).float()


def _q4_1(blocks: torch.Tensor) -> Numbers:
    return _nibbles(blocks[..., 4:]), _float16(blocks, 0).float(), _float16(blocks, 2).float()


def _q5_0(blocks: torch.Tensor) -> Numbers:
    return _nibbles(blocks[..., 6:]) | _bits(blocks[..., 2:6]) << 4, _float16(blocks, 0).float()


def _q5_1(blocks: torch.Tensor) -> Numbers:
    codes = _nibbles(blocks[..., 8:]) | _bits(blocks[..., 4:8]) << 4
    return codes, _float16(blocks, 0).float(), _float16(blocks, 2).float()


def _q8_0(blocks: torch.Tensor) -> Numbers:
    return blocks[..., 2:] ^ 0x80, _float16(blocks, 0).float()


def _mxfp4(blocks: torch.Tensor) -> Numbers:
    return _nibbles(blocks[..., 1:]), torch.exp2(blocks[..., :1].float() - 128)


def _crumbs(packed: torch.Tensor) -> torch.Tensor:
    """[..., 64] bytes -> [..., 256] of 2 bits: of each half the lowest bits of its 32 bytes, then the next."""
    halves = torch.stack((packed[..., :32], packed[..., 32:]), dim=-2).unsqueeze(-2)
    return (halves >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3).flatten(-3)


def _planes(packed: torch.Tensor) -> torch.Tensor:
    """[..., 32] bytes -> [..., 256] of 1 bit: the lowest bits of all bytes, then the next."""
    shifts = torch.arange(8, dtype=torch.uint8).unsqueeze(-1)
    return (packed.unsqueeze(-2) >> shifts & 1).flatten(-2)


def _q2_k(blocks: torch.Tensor) -> Numbers:
    scales = blocks[..., :16]
    return (
        _crumbs(blocks[..., 16:80]),
        _float16(blocks, 80),
        -_float16(blocks, 82),
        (scales & 15).view(torch.int8),
        (scales >> 4).view(torch.int8),
    )


def _q3_k(blocks: torch.Tensor) -> Numbers:
    low, high = _nibbles(blocks[..., 96:104]), blocks[..., 104:108]
    upper = (high.unsqueeze(-2) >> torch.tensor([[0], [2], [4], [6]], dtype=torch.uint8) & 3).flatten(-2)
    scales = (low | upper << 4).view(torch.int8) - 32
    return _crumbs(blocks[..., 32:96]) | _planes(blocks[..., :32]) << 2, _float16(blocks, 108), None, scales


def _k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes -> 8 scales and 8 minima of 6 bits, int8."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), dim=-1)
    minima = torch.cat((second & 63, third >> 4 | second >> 6 << 4), dim=-1)
    return scales.view(torch.int8), minima.view(torch.int8)


def _k_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """128 bytes -> 256: of each 32 bytes the low halves, then the high halves."""
    return torch.cat([_nibbles(packed[..., at : at + 32]) for at in range(0, 128, 32)], dim=-1)


def _q4_k(blocks: torch.Tensor) -> Numbers:
    scales, minima = _k_scales(blocks[..., 4:16])
    return _k_nibbles(blocks[..., 16:]), _float16(blocks, 0), -_float16(blocks, 2), scales, minima


def _q5_k(blocks: torch.Tensor) -> Numbers:
    scales, minima = _k_scales(blocks[..., 4:16])
    codes = _k_nibbles(blocks[..., 48:]) | _planes(blocks[..., 16:48]) << 4
    return codes, _float16(blocks, 0), -_float16(blocks, 2), scales, minima


def _q6_k(blocks: torch.Tensor) -> Numbers:
    low = torch.cat((_nibbles(blocks[..., :64]), _nibbles(blocks[..., 64:128])), dim=-1)
    codes = low | _crumbs(blocks[..., 128:192]) << 4
    return codes, _float16(blocks, 208), None, blocks[..., 192:208].view(torch.int8)


CODED_TYPES: Mapping[GGMLQuantizationType, _Type] = {
    GGMLQuantizationType.Q4_0: _Type(CodeLayout("u4", zero=8), _q4_0),
    GGMLQuantizationType.Q4_1: _Type(CodeLayout("u4", has_minimum=True), _q4_1),
    GGMLQuantizationType.Q5_0: _Type(CodeLayout("u5", zero=16), _q5_0),
    GGMLQuantizationType.Q5_1: _Type(CodeLayout("u5", has_minimum=True), _q5_1),
    GGMLQuantizationType.Q8_0: _Type(CodeLayout("u8", zero=128), _q8_0),
    GGMLQuantizationType.Q2_K: _Type(CodeLayout("u2", group_len=16, scale="sub", has_minimum=True), _q2_k),
    GGMLQuantizationType.Q3_K: _Type(CodeLayout("u3", zero=4, group_len=16, scale="sub"), _q3_k),
    GGMLQuantizationType.Q4_K: _Type(CodeLayout("u4", scale="sub", has_minimum=True), _q4_k),
    GGMLQuantizationType.Q5_K: _Type(CodeLayout("u5", scale="sub", has_minimum=True), _q5_k),
    GGMLQuantizationType.Q6_K: _Type(CodeLayout("u6", zero=32, group_len=16, scale="sub"), _q6_k),
    GGMLQuantizationType.IQ4_NL: _Type(CodeLayout("u4", values=IQ4_NL_VALUES), _q4_0),
    GGMLQuantizationType.MXFP4: _Type(CodeLayout("u4", scale="float32", values=MXFP4_VALUES), _mxfp4),
}
"""The types that kernels multiply as they are; others are decoded to plain values."""
