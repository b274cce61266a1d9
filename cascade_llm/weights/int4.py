"""Weight-only int4: four bits a weight, and a scale and a zero point for every 32 of them.

A decode step of one request reads every weight once and multiplies it once, so it takes as long as the reading. In int4
a weight is 0.625 bytes instead of the 2 of bfloat16. The arithmetic stays in bfloat16 with float32 sums; activations
are not quantized. Above `MAX_ROWS` rows the unpacking costs more than the reading saves, so a matrix that is not
quantized is kept for them: int4 is for speed, and takes a third more memory than dense. That matrix holds the values
that the four bits stand for, so that few rows and many have the same product up to rounding.

The products are torch core's; a kernel of our own for its layout was no faster at one row and slower at four.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from cascade_llm.weights.dense import Dense
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat

__all__ = ["GROUP_LEN", "MAX_ROWS", "Int4", "quantize"]

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


class Int4(WeightFormat):
    """weight = (code - 8) * scale + zero, for steps of few rows; another format serves the others."""

    name = "int4"

    def __init__(self, spec: MatrixSpec, many_rows: Callable[[], WeightFormat]) -> None:
        """`many_rows`: makes the matrix that multiplies more than `MAX_ROWS` rows."""
        self._spec, self._make_many_rows = spec, many_rows
        self._missing = set(spec.parts)
        self._dense: Dense | None = None
        self._many_rows: WeightFormat | None = None
        self._codes = self._scales_and_zeros = torch.empty(0)

    @staticmethod
    def reasons_against(spec: MatrixSpec) -> list[str]:
        """The device, the dtype, or a shape that is no multiple of the kernel's."""
        reasons, options = [], spec.options
        if options.device.type != "cpu" or options.on_stream:
            device = "a GPU" if options.on_stream else options.device.type
            reasons.append(f"it is for the CPU so far, the device is {device}: set device='cpu'")
        if options.dtype != torch.bfloat16:
            dtype = str(options.dtype).removeprefix("torch.")
            reasons.append(f"its kernel is fast in bfloat16 only, the dtype is {dtype}: set dtype='bfloat16'")
        if spec.in_features % GROUP_LEN:
            reasons.append(f"{spec.name} has {spec.in_features} inputs, which are not groups of {GROUP_LEN}")
        if spec.out_features % OUTPUT_MULTIPLE:
            reasons.append(f"{spec.name} has {spec.out_features} outputs, which is not a multiple of {OUTPUT_MULTIPLE}")
        return reasons

    def load(self, part: str, stored: StoredTensor) -> None:
        """See `WeightFormat`; the last part rounds the matrix, so that few wait in the checkpoint's dtype."""
        self._dense = self._dense or Dense(self._spec, self._spec.options.stored_dtype)
        self._dense.load(part, stored)
        self._missing.remove(part)
        if not self._missing:
            self._codes, self._scales_and_zeros, values = quantize(self._dense.values)
            self._dense, self._many_rows = None, self._make_many_rows()
            for name in self._spec.parts:
                self._many_rows.load(name, StoredTensor.plain(values[self._spec.rows_of(name)]))

    def pack(self) -> None:
        """See `WeightFormat`; the four bits are packed already."""
        self._loaded().pack()

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `WeightFormat`; once all parts are loaded."""
        if x.shape[0] > MAX_ROWS:
            return self._loaded().multiply(x, bias, out)
        y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu.default(
            x.contiguous(), self._codes, GROUP_LEN, self._scales_and_zeros
        )
        if bias is not None:
            y.add_(bias)
        return y if out is None else out.copy_(y)

    @property
    def num_bytes(self) -> int:
        """See `WeightFormat`; the matrix for many rows is counted."""
        held = sum(matrix.num_bytes for matrix in (self._dense, self._many_rows) if matrix is not None)
        return held + self._codes.nbytes + self._scales_and_zeros.nbytes

    def _loaded(self) -> WeightFormat:
        assert self._many_rows is not None, f"{sorted(self._missing)} not loaded"
        return self._many_rows


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The nearest int4 matrix to a weight [out_features, in_features] of any float dtype.

    Weights that came from GGUF's Q4_0 or Q4_1 keep their codes; scale and zero are rounded to bfloat16.

    Returns:
        Codes 0 to 15, two in a byte, in an order that is the kernel's own; scales and zeros
        [in_features / 32, out_features, 2], bfloat16; and the values that they stand for, float32, shaped as `weight`.
    """
    parts = [_nearest(rows) for rows in torch.split(weight, CHUNK_ROWS)]
    codes, scales_and_zeros, values = (torch.cat(part) for part in zip(*parts, strict=True))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, scales_and_zeros.transpose(0, 1).contiguous(), values


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
