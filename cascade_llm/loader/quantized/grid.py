"""What turns the codes of one quantized matrix into weights, and the matrix as a `StoredTensor` of whole rows.

Files keep codes, scales and zero points in tensors of their own, some of them transposed. A row here is the bytes of
its codes, of its scales and of its minima, one behind the other, so that any rows can be cut out and read alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch

from cascade_llm.weights.codes import FLOAT_CODES, CodeLayout, Codes
from cascade_llm.weights.format import StoredTensor

__all__ = ["Grid", "groups_of", "integer_grid", "stored_matrix"]


@dataclass(frozen=True, eq=False)
class Grid:
    """All of a matrix [out, in] but its codes."""

    shape: tuple[int, int]
    layout: CodeLayout
    scales: torch.Tensor
    """[out, groups] float32"""
    minima: torch.Tensor | None = None
    """[out, groups] float32, where the layout has them"""
    input_order: torch.Tensor | None = None
    """int64 [in], see `Codes`"""


@dataclass(frozen=True, eq=False)
class RowReader:
    """Reads the rows that `stored_matrix` writes."""

    layout: CodeLayout
    num_inputs: int
    num_groups: int
    input_order: torch.Tensor | None

    def codes(self, rows: torch.Tensor) -> Codes:
        """Of rows, uint8 [rows, bytes of a row]."""
        middle = self.num_inputs + 4 * self.num_groups
        codes, scales, minima = rows[:, : self.num_inputs], rows[:, self.num_inputs : middle], rows[:, middle:]
        return Codes(
            self.layout,
            codes.view(FLOAT_CODES.get(self.layout.code, torch.uint8)),
            _floats(scales),
            _floats(minima) if self.layout.has_minimum else None,
            input_order=self.input_order,
        )

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 values [rows, in]."""
        return self.codes(rows).dequantized()


def stored_matrix(name: str, grid: Grid, codes: torch.Tensor) -> StoredTensor:
    """A matrix of `codes` [out, in], uint8 or a float of 8 bits, in the order of the inputs; `name`: its format."""
    if grid.input_order is not None:
        codes = codes.view(torch.uint8)[:, grid.input_order]
    numbers = [grid.scales] if grid.minima is None else [grid.scales, grid.minima]
    data = torch.cat([codes.view(torch.uint8), *(_bytes(part) for part in numbers)], dim=1)
    reader = RowReader(grid.layout, grid.shape[1], grid.scales.shape[1], grid.input_order)
    return StoredTensor(name, grid.shape, data, reader.decode, reader.codes)


def groups_of(num_inputs: int, group_len: int) -> tuple[int, torch.Tensor]:
    """The largest equal groups that do not cross the stored ones, of which the last may be short.

    Returns:
        their length, and the stored group of each, int64
    """
    unit = gcd(num_inputs, group_len)
    return unit, torch.arange(0, num_inputs, unit) // group_len


def integer_grid(
    shape: tuple[int, int],
    bits: int,
    group_len: int,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    input_order: torch.Tensor | None = None,
) -> Grid:
    """Of unsigned integers.

    Args:
        shape: [out, in]
        bits: of a code
        group_len: inputs that share a scale
        scales: [out, groups], as the file has them
        zeros: [out, groups], the zero points; None where all are in the middle
        input_order: see `Codes`
    """
    code, middle = f"u{bits}", 1 << (bits - 1)
    wide = scales.float()
    if zeros is None:
        kind = "float16" if scales.dtype == torch.float16 else "float32"
        return Grid(shape, CodeLayout(code, middle, group_len, kind), wide, None, input_order)
    layout = CodeLayout(code, 0, group_len, "float32", has_minimum=True)
    return Grid(shape, layout, wide, -wide * zeros.float(), input_order)


def _bytes(numbers: torch.Tensor) -> torch.Tensor:
    """A copy even of what is contiguous: one column may have any stride."""
    return numbers.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _floats(numbers: torch.Tensor) -> torch.Tensor:
    """The copy is aligned, which a slice of bytes need not be."""
    return numbers.clone(memory_format=torch.contiguous_format).view(torch.float32)
