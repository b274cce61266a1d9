"""A stack of matrices that compiled code multiplies in one call: its threads share the parts that have rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from cascade_llm.device.huge_pages import MemoryRange
from cascade_llm.device.native_function import NativeFunction
from cascade_llm.errors import CapacityError
from cascade_llm.weights.format import MatrixSpec, WeightFormat
from cascade_llm.weights.stack import MatrixStack

__all__ = ["NativeStack"]


class NativeStack(MatrixStack):
    """Matrices of one spec, each given to the kernel as the same number of parts."""

    def __init__(
        self,
        spec: MatrixSpec,
        matrices: Sequence[WeightFormat],
        parts: Any,
        kernel: NativeFunction,
        flags: Sequence[bool],
    ) -> None:
        """Holds the matrices, whose memory the parts point to.

        Args:
            spec: of each matrix
            matrices: in the order of the stack
            parts: a ctypes array, those of the first matrix first
            kernel: takes x, sources, parts, parts of a matrix, ends, matrices, bias, y, inputs, outputs, the flags and
                the number of threads; 0 unless memory failed
            flags: of the kernel's own
        """
        self._spec, self._matrices, self._parts = spec, matrices, parts
        self._kernel, self._flags = kernel, flags

    def multiply(
        self, x: torch.Tensor, ends: torch.Tensor, sources: torch.Tensor | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `MatrixStack`."""
        spec = self._spec
        x = x.contiguous()
        assert x.dtype == spec.options.dtype
        assert x.shape[1] == spec.in_features
        assert ends.dtype == torch.int32
        y = x.new_empty(len(x) if sources is None else len(sources), spec.out_features)
        failed = self._kernel(
            x.data_ptr(),
            None if sources is None else sources.data_ptr(),
            self._parts,
            len(self._parts) // len(self._matrices),
            ends.data_ptr(),
            len(self._matrices),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            spec.in_features,
            spec.out_features,
            *self._flags,
            torch.get_num_threads(),
        )
        if failed:
            raise CapacityError(f"no memory for a product of {len(y)} rows: lower max_num_batched_tokens")
        return y

    @property
    def num_bytes(self) -> int:
        """See `MatrixStack`."""
        return sum(matrix.num_bytes for matrix in self._matrices)

    @property
    def memory(self) -> tuple[MemoryRange, ...]:
        """See `MatrixStack`."""
        return tuple(part for matrix in self._matrices for part in matrix.memory)

    @property
    def note(self) -> str | None:
        """See `MatrixStack`."""
        return next((matrix.note for matrix in self._matrices if matrix.note), None)

    def describe(self) -> str:
        """See `MatrixStack`."""
        return "experts of " + " and ".join(dict.fromkeys(matrix.describe() for matrix in self._matrices))
