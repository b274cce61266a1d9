"""Weight-only int4: four bits a weight, and a scale and a zero point for every 32 of them.

A decode step of one request reads every weight once and multiplies it once, so it takes as long as the reading. In int4
a weight is 0.625 bytes instead of the 2 of bfloat16. The arithmetic stays in bfloat16 with float32 sums; activations
are not quantized. Above `MAX_ROWS` rows the unpacking costs more than the reading saves, so the dense weight is kept
for them: int4 is for speed, and takes a third more memory than dense.

The products are torch core's; a kernel of our own for its layout was no faster at one row and slower at four.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

__all__ = ["GROUP_LEN", "MAX_ROWS", "Int4Weight", "reasons_against_int4"]

GROUP_LEN = 32
"""Inputs that share a scale and a zero point: the block of GGUF's Q4_0 and Q4_1, and a divisor of most layers."""
OUTPUT_MULTIPLE = 16
"""The kernel takes outputs in vectors of this length."""
MAX_ROWS = 4
"""Up to here int4 beats dense bfloat16. All layers of SmolLM2 at 1, 4, 5 and 8 rows: 3.5, 4.3, 6.9, 7.6 ms against
5.0, 6.1, 6.1, 6.5 ms."""

MAX_CODE, MIDDLE_CODE = 15, 8
CHUNK_ROWS = 4096
"""Rows that are quantized at a time: a head's float32 temporaries would otherwise fill a gigabyte."""


def reasons_against_int4(dtype: torch.dtype, device: torch.device, shapes: Iterable[tuple[str, int, int]]) -> list[str]:
    """Why int4 cannot serve; empty where it can.

    Args:
        dtype: of activations
        device: where the products run
        shapes: name, in_features and out_features of each layer
    """
    reasons = []
    if device.type != "cpu":
        reasons.append(f"it is for the CPU so far, the device is {device.type}: set device='cpu'")
    if dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        reasons.append(f"its kernel is fast in bfloat16 only, the dtype is {name}: set dtype='bfloat16'")
    for name, inputs, outputs in shapes:
        if inputs % GROUP_LEN:
            reasons.append(f"{name} has {inputs} inputs, which are not groups of {GROUP_LEN}")
        if outputs % OUTPUT_MULTIPLE:
            reasons.append(f"{name} has {outputs} outputs, which is not a multiple of {OUTPUT_MULTIPLE}")
    return reasons


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A matrix [out_features, in_features] in torch's int4 layout: weight = (code - 8) * scale + zero."""

    packed: torch.Tensor
    """Codes 0 to 15, two in a byte, in an order that is the kernel's own."""
    scales_and_zeros: torch.Tensor
    """[in_features / 32, out_features, 2], bfloat16"""

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> tuple[Int4Weight, torch.Tensor]:
        """The nearest int4 matrix, and the float32 values [out_features, in_features] that it stands for.

        Weights that came from GGUF's Q4_0 or Q4_1 keep their codes; scale and zero are rounded to bfloat16.
        """
        parts = [_nearest(rows) for rows in torch.split(weight, CHUNK_ROWS)]
        codes, scales_and_zeros, values = (torch.cat(part) for part in zip(*parts, strict=True))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        return cls(packed, scales_and_zeros.transpose(0, 1).contiguous()), values

    @property
    def num_bytes(self) -> int:
        """Codes, scales and zeros."""
        return self.packed.nbytes + self.scales_and_zeros.nbytes

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, in_features] times the transposed matrix -> [rows, out_features]; both bfloat16, x contiguous."""
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            x, self.packed, GROUP_LEN, self.scales_and_zeros
        )
        return y


def _nearest(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [rows, inputs], int32; scales and zeros [rows, groups, 2], bfloat16; and the values that they give.

    Of two grids each group takes the one that comes closer.
    """
    groups = weight.float().view(len(weight), -1, GROUP_LEN)
    spanning, symmetric = (_codes(groups, *grid) for grid in (_spanning_grid(groups), _symmetric_grid(groups)))
    errors = [(values - groups).square_().sum(-1, keepdim=True) for *_, values in (spanning, symmetric)]
    closer = errors[1] < errors[0]
    codes, scale, zero, values = (torch.where(closer, b, a) for a, b in zip(spanning, symmetric, strict=True))
    return codes.flatten(1).int(), torch.cat((scale, zero), dim=-1).bfloat16(), values.flatten(1)


def _spanning_grid(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero that put the smallest weight of a group on code 0 and the largest on 15: Q4_1's grid."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = _rounded((high - low) / MAX_CODE)
    return scale, _rounded(low + MIDDLE_CODE * scale)


def _symmetric_grid(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale that puts the weight of largest magnitude on code 0, and zero 0: Q4_0's grid."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = _rounded(extreme / -MIDDLE_CODE)
    return scale, torch.zeros_like(scale)


def _codes(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of the nearest points of a grid, the grid, and the values of those points."""
    steps = torch.where(scale == 0, 0.0, (groups - zero) / scale).round_()
    codes = (steps + MIDDLE_CODE).clamp_(0, MAX_CODE)
    return codes, scale, zero, (codes - MIDDLE_CODE) * scale + zero


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """As the kernel holds it."""
    return x.bfloat16().float()
