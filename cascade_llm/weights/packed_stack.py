"""A stack of packed matrices, multiplied in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.weights.format import WeightFormat
from cascade_llm.weights.native_stack import NativeStack
from cascade_llm.weights.packed import Packed
from cascade_llm.weights.packed_kernels import Piece, packed_kernels

__all__ = ["PackedStack"]


class PackedStack(NativeStack):
    """Packed matrices of one spec; each may have codes of its own kind."""

    def __init__(self, matrices: Sequence[Packed]) -> None:
        """`matrices`: such as `holds` says yes to."""
        spec = matrices[0].spec
        pieces = [piece for matrix in matrices for piece in matrix.pieces or ()]
        flags = (spec.options.dtype == torch.bfloat16,)
        super().__init__(spec, matrices, (Piece * len(pieces))(*pieces), packed_kernels().stack_product, flags)

    @staticmethod
    def holds(matrices: Sequence[WeightFormat]) -> bool:
        """Whether all are packed, and take their inputs in order."""
        return all(isinstance(matrix, Packed) and matrix.pieces is not None for matrix in matrices)
