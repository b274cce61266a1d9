"""A layer that holds a stack of matrices: y = x Wᵀ + b, with the W and b of each row's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cascade_llm.device.ranks import Ranks
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat
from cascade_llm.weights.packed import Packed
from cascade_llm.weights.select import build_expert, join_experts
from cascade_llm.weights.stack import Grouped, MatrixStack

__all__ = ["StackedLinear"]


class StackedLinear:
    """Linear layers of one shape without gradients, of which each row meets one.

    On a CPU a matrix is built as soon as its last part is there, so that one of them stands in memory beside its source
    at a time. On a GPU all are plain values in one tensor.
    """

    def __init__(self, spec: MatrixSpec, num_matrices: int, *, bias: bool = False, ranks: Ranks | None = None) -> None:
        """Without values.

        Args:
            spec: of one matrix
            num_matrices: how many there are
            bias: whether each has one; zero until it is loaded
            ranks: that share each matrix, where the spec says so; nothing is summed over them here
        """
        self.spec, self.held, self.num_matrices = spec, spec.held, num_matrices
        self._has_bias = spec.inputs is None or ranks is None or ranks.is_first  # a sum over ranks has it once
        options = spec.options
        self._parts: dict[int, dict[str, StoredTensor]] = {index: {} for index in range(num_matrices)}
        self._matrices: list[WeightFormat | None] = [None] * num_matrices
        self._stack: MatrixStack | None = None
        on_host = options.device.type == "cpu" and not options.on_stream
        self._grouped = None if on_host or Grouped.reasons_against(self.held) else Grouped(self.held, num_matrices)
        self.decoded: frozenset[str] = frozenset()
        """As `Linear.decoded`."""
        shape = num_matrices, self.held.out_features
        self.bias = torch.zeros(shape, dtype=options.dtype, device=options.device) if bias else None

    @property
    def matrix(self) -> MatrixStack:
        """Once all parts are loaded."""
        assert self._stack is not None, f"{self.spec.name} has no values"
        return self._stack

    def load(self, index: int, part: str, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [rows of the part, in_features] as that part of a matrix."""
        parts = self._parts[index]
        parts[part] = self.spec.held_part(part, stored)
        if len(parts) < len(self.spec.parts):
            return
        del self._parts[index]
        self._build(index, parts)
        for stored in parts.values():
            stored.release()
        if not self._parts:
            self._stack = self._grouped or join_experts(self.held, [m for m in self._matrices if m is not None])
            self._matrices = []

    def load_bias(self, index: int, part: str, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [rows of the part] as that part of a matrix's bias."""
        assert self.bias is not None
        if self._has_bias:
            self.bias[index, self.held.rows_of(part)] = self.spec.held_part(part, stored).values()

    def __call__(self, x: torch.Tensor, ends: torch.Tensor, sources: torch.Tensor | None = None) -> torch.Tensor:
        """[n, out_features]; the arguments are those of `MatrixStack.multiply`."""
        assert self._stack is not None
        return self._stack.multiply(x, ends, sources, self.bias)

    def _build(self, index: int, parts: Mapping[str, StoredTensor]) -> None:
        matrix: WeightFormat | None = None
        if self._grouped is not None:
            self._grouped.put(index, parts)
        else:
            matrix = self._matrices[index] = build_expert(self.held, parts)
        if not isinstance(matrix, Packed):
            self.decoded |= {stored.format for stored in parts.values() if stored.decode is not None}
