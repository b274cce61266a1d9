"""What turns the codes of one quantized matrix into weights, and the matrix as a `StoredTensor` of whole rows.

Files keep codes, scales and zero points in tensors of their own, some of them transposed. A row here is the bytes of
its codes, of its scales and of its minima, one behind the other, so that any rows can be cut out and read alone. Codes
stay in the file until the rows and inputs that somebody needs are known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd

import torch

from cascade_llm.weights.codes import FLOAT_CODES, CodeLayout, Codes, groups_of_part
from cascade_llm.weights.format import StoredTensor, Unread

__all__ = ["CodeReader", "Grid", "groups_of", "integer_grid", "stored_matrix", "unpaired"]

CodeReader = Callable[[slice, slice], torch.Tensor]
"""Of rows and inputs of a matrix the codes [rows, inputs], uint8 or a float of 8 bits, in the order of the inputs."""


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

    def rows(self, rows: slice) -> Grid:
        """Of some outputs."""
        scales, minima = self.scales[rows], None if self.minima is None else self.minima[rows]
        return replace(self, shape=(len(scales), self.shape[1]), scales=scales, minima=minima)

    def columns(self, part: slice) -> Grid | None:
        """Of some inputs, with start and stop; None where `Codes.columns` gives none."""
        assert self.layout.group_len is not None
        cut = None if self.input_order is not None else groups_of_part(self.layout.group_len, part)
        if cut is None:
            return None
        unit, kept = cut
        return Grid(
            (self.shape[0], part.stop - part.start),
            replace(self.layout, group_len=unit),
            self.scales[:, kept],
            None if self.minima is None else self.minima[:, kept],
        )


@dataclass(frozen=True, eq=False)
class RowReader:
    """Reads the rows that `stored_matrix` writes."""

    layout: CodeLayout
    num_inputs: int
    num_groups: int
    input_order: torch.Tensor | None

    def codes(self, rows: torch.Tensor) -> Codes:
        """Of rows, uint8 [rows, bytes of a row]."""
        is_paired, number = self.layout.code == "u4", _number_of(self.layout)
        first = (self.num_inputs + 1) // 2 if is_paired else self.num_inputs
        end = first + number.itemsize * self.num_groups
        codes, scales, minima = rows[:, :first], rows[:, first:end], rows[:, end:]
        if is_paired:
            codes = unpaired(codes)[:, : self.num_inputs]
        return Codes(
            self.layout,
            codes.view(FLOAT_CODES.get(self.layout.code, torch.uint8)),
            _copied(scales).view(number).float(),
            _copied(minima).view(number).float() if self.layout.has_minimum else None,
            input_order=self.input_order,
        )

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 values [rows, in]."""
        return self.codes(rows).dequantized()


@dataclass(frozen=True, eq=False)
class UnreadMatrix(Unread):
    """A part of a matrix whose codes are still in the file."""

    name: str
    """Of the format."""
    grid: Grid
    """Of the part."""
    codes: CodeReader
    """Of the whole matrix."""
    outputs: range
    """Of the part, in the whole matrix."""
    inputs: range
    dtype = torch.uint8

    @property
    def num_bytes(self) -> int:
        """See `Unread`."""
        numbers = self.grid.scales.numel() * (1 if self.grid.minima is None else 2)
        num_codes = len(self.outputs) * len(self.inputs)
        return num_codes * self.grid.layout.bits // 8 + numbers * _number_of(self.grid.layout).itemsize

    def rows(self, rows: slice) -> UnreadMatrix:
        """See `Unread`."""
        return replace(self, grid=self.grid.rows(rows), outputs=self.outputs[rows])

    def columns(self, part: slice) -> StoredTensor | None:
        """See `Unread`."""
        grid = self.grid.columns(part)
        return None if grid is None else replace(self, grid=grid, inputs=self.inputs[part]).stored()

    def stored(self) -> StoredTensor:
        """The part as a tensor."""
        grid = self.grid
        reader = RowReader(grid.layout, grid.shape[1], grid.scales.shape[1], grid.input_order)
        return StoredTensor(self.name, grid.shape, self, reader.decode, reader.codes)

    def read(self) -> torch.Tensor:
        """See `Unread`."""
        grid, codes = self.grid, self.codes(_slice(self.outputs), _slice(self.inputs)).view(torch.uint8)
        if grid.input_order is not None:
            codes = codes[:, grid.input_order]
        if grid.layout.code == "u4":
            codes = _paired(codes)
        numbers = [grid.scales] if grid.minima is None else [grid.scales, grid.minima]
        stored = (_copied(part.to(_number_of(grid.layout))).view(torch.uint8) for part in numbers)
        return torch.cat([codes, *stored], dim=1)


def stored_matrix(name: str, grid: Grid, codes: CodeReader) -> StoredTensor:
    """A matrix as its file has it; `name`: its format."""
    return UnreadMatrix(name, grid, codes, range(grid.shape[0]), range(grid.shape[1])).stored()


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


def unpaired(stored: torch.Tensor) -> torch.Tensor:
    """Codes of 4 bits, two to a byte, the lower half first: uint8 [rows, 2 * bytes] of [rows, bytes]."""
    return torch.stack((stored & 15, stored >> 4), dim=-1).flatten(1)


def _paired(codes: torch.Tensor) -> torch.Tensor:
    """The reverse; the half behind an odd number of codes is 0."""
    even, odd = codes[:, ::2], codes[:, 1::2]
    stored = even.clone()
    stored[:, : odd.shape[1]] |= odd << 4
    return stored


def _number_of(layout: CodeLayout) -> torch.dtype:
    return torch.float16 if layout.scale == "float16" else torch.float32


def _copied(numbers: torch.Tensor) -> torch.Tensor:
    """In a layout that bytes are views of: a slice may be unaligned, and one column may have any stride."""
    return numbers.clone(memory_format=torch.contiguous_format)


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop, numbers.step)
