"""Matrices of one shape that different rows are multiplied by: the experts of a layer, in one product.

The rows of a product lie ordered by matrix, and `ends` says where those of each matrix end. Most matrices have few rows
in a decode step or none, so a format reads only those that have some.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch

from cascade_llm.device.huge_pages import MemoryRange
from cascade_llm.weights.format import MatrixSpec, Refusal, StoredTensor, WeightFormat

__all__ = ["Grouped", "MatrixStack", "OneByOne", "group_rows"]


class MatrixStack(ABC):
    """Matrices [out_features, in_features] of one device, each in one format."""

    reason_against_capture: str | None = None
    """Why a CUDA graph cannot hold its product; None where one can."""

    @abstractmethod
    def multiply(
        self, x: torch.Tensor, ends: torch.Tensor, sources: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y = x Wᵀ + bias, with the matrix and the bias of each row's own.

        Args:
            x: [rows, in_features], the model's dtype
            ends: int32 [matrices], where the rows of each matrix end
            sources: int64 [n], the row of x that each row of the product takes; default all, in their order
            bias: [matrices, out_features]

        Returns:
            y [n, out_features], x's dtype
        """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that the matrices take."""

    @property
    def memory(self) -> tuple[MemoryRange, ...]:
        """As `WeightFormat.memory`, of all matrices."""
        return ()

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """As `WeightFormat.refused`, of all matrices."""
        return ()

    @property
    def note(self) -> str | None:
        """As `WeightFormat.note`, of the first matrix that has one."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """Of one matrix, for the log."""


class OneByOne(MatrixStack):
    """A product for each matrix that has rows, in any format: what the others are compared with."""

    reason_against_capture = "experts are multiplied one by one here, and the host reads how many rows each has"

    def __init__(self, matrices: list[WeightFormat], out_features: int) -> None:
        self.matrices, self._out_features = matrices, out_features

    def multiply(
        self, x: torch.Tensor, ends: torch.Tensor, sources: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `MatrixStack`; reads `ends` on the host."""
        rows = x if sources is None else x[sources]
        y = rows.new_empty(len(rows), self._out_features)
        for index, own in group_rows(ends):
            y[own] = self.matrices[index].multiply(rows[own], None if bias is None else bias[index])
        return y

    @property
    def num_bytes(self) -> int:
        """See `MatrixStack`."""
        return sum(matrix.num_bytes for matrix in self.matrices)

    @property
    def memory(self) -> tuple[MemoryRange, ...]:
        """See `MatrixStack`."""
        return tuple(part for matrix in self.matrices for part in matrix.memory)

    @property
    def refused(self) -> tuple[Refusal, ...]:
        """See `MatrixStack`."""
        return tuple(dict.fromkeys(refusal for matrix in self.matrices for refusal in matrix.refused))

    @property
    def note(self) -> str | None:
        """See `MatrixStack`."""
        return next((matrix.note for matrix in self.matrices if matrix.note), None)

    def describe(self) -> str:
        """See `MatrixStack`."""
        return ", ".join(dict.fromkeys(matrix.describe() for matrix in self.matrices))


class Grouped(MatrixStack):
    """Plain values, multiplied in one launch by torch's grouped product."""

    MULTIPLE = 8
    """Of inputs and outputs, for bfloat16: rows begin at multiples of 16 bytes."""
    ARCHS = (9, 10)
    """Major compute capabilities with torch's kernel; others loop over matrices on the host (pytorch issue 169970)."""

    def __init__(self, spec: MatrixSpec, num_matrices: int) -> None:
        """Without values."""
        self._spec = spec
        shape = num_matrices, spec.out_features, spec.in_features
        self.values = torch.empty(shape, dtype=spec.options.dtype, device=spec.options.device)

    @classmethod
    def reasons_against(cls, spec: MatrixSpec) -> list[str]:
        """The GPU, the dtype or the shape."""
        arch = spec.options.arch
        if arch is not None and arch[0] not in cls.ARCHS:
            return [f"its kernel is for compute capability 9 and 10, the GPU has {arch[0]}.{arch[1]}"]
        if spec.options.dtype != torch.bfloat16:
            return [f"it multiplies bfloat16, not {str(spec.options.dtype).removeprefix('torch.')}"]
        if spec.in_features % cls.MULTIPLE or spec.out_features % cls.MULTIPLE:
            return [f"{spec.name} is {spec.out_features} x {spec.in_features}, it takes multiples of {cls.MULTIPLE}"]
        return []

    def put(self, index: int, parts: Mapping[str, StoredTensor]) -> None:
        """Give a matrix its values; codes are decoded."""
        for part, stored in parts.items():
            stored.write_to(self.values[index, self._spec.rows_of(part)])

    def multiply(
        self, x: torch.Tensor, ends: torch.Tensor, sources: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `MatrixStack`; nothing is read on the host."""
        rows = x if sources is None else x[sources]
        y: torch.Tensor = torch.nn.functional.grouped_mm(rows, self.values.transpose(1, 2), offs=ends)
        if bias is not None:
            owners = torch.searchsorted(ends, torch.arange(len(rows), device=ends.device, dtype=ends.dtype), right=True)
            y = y + bias[owners]
        return y

    @property
    def num_bytes(self) -> int:
        """See `MatrixStack`."""
        return self.values.nbytes

    def describe(self) -> str:
        """See `MatrixStack`."""
        return "grouped"


def group_rows(ends: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """The matrices that have rows, and those rows."""
    first = 0
    for index, end in enumerate(ends.tolist()):
        if end > first:
            yield index, slice(first, end)
        first = end
