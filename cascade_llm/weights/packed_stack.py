"""A stack of packed matrices, multiplied in one call: the threads share the tiles of all matrices that have rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.device.huge_pages import MemoryRange
from cascade_llm.errors import CapacityError
from cascade_llm.weights.format import WeightFormat
from cascade_llm.weights.packed import Packed
from cascade_llm.weights.packed_kernels import Piece, packed_kernels
from cascade_llm.weights.stack import MatrixStack

__all__ = ["PackedStack"]


class PackedStack(MatrixStack):
    """Packed matrices of one spec; each may have codes of its own kind."""

    def __init__(self, matrices: Sequence[Packed]) -> None:
        """`matrices`: such as `holds` says yes to."""
        self._matrices = matrices  # their tiles are what the pieces point to
        self._spec = matrices[0].spec
        pieces = [piece for matrix in matrices for piece in matrix.pieces or ()]
        self._pieces_each = len(pieces) // len(matrices)
        self._pieces = (Piece * len(pieces))(*pieces)
        self._product = packed_kernels().stack_product

    @staticmethod
    def holds(matrices: Sequence[WeightFormat]) -> bool:
        """Whether all are packed, and take their inputs in order."""
        return all(isinstance(matrix, Packed) and matrix.pieces is not None for matrix in matrices)

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
        failed = self._product(
            x.data_ptr(),
            None if sources is None else sources.data_ptr(),
            self._pieces,
            self._pieces_each,
            ends.data_ptr(),
            len(self._matrices),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            spec.in_features,
            spec.out_features,
            x.dtype == torch.bfloat16,
            spec.options.exact_activations,
            torch.get_num_threads(),
        )
        if failed:
            raise CapacityError(f"no memory for the inputs of {len(y)} rows: lower max_num_batched_tokens")
        return y

    @property
    def num_bytes(self) -> int:
        """See `MatrixStack`."""
        return sum(matrix.num_bytes for matrix in self._matrices)

    @property
    def memory(self) -> tuple[MemoryRange, ...]:
        """See `MatrixStack`."""
        return tuple(part for matrix in self._matrices for part in matrix.memory)

    def describe(self) -> str:
        """See `MatrixStack`."""
        return "experts of " + " and ".join(dict.fromkeys(matrix.describe() for matrix in self._matrices))
