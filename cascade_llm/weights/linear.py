"""Layers that hold a matrix: y = x Wᵀ + b, and the rows of an embedding."""

from __future__ import annotations

import torch

from cascade_llm.weights.dense import Dense
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat
from cascade_llm.weights.packed import Packed
from cascade_llm.weights.select import build_embedding, build_matrix, build_tied_matrix

__all__ = ["Embedding", "Linear"]


class Linear:
    """A linear layer without gradients: a matrix in the format that `weights.select` chooses, and a bias."""

    def __init__(self, spec: MatrixSpec, *, bias: bool = False, tied_to: Embedding | None = None) -> None:
        """Without values.

        Args:
            spec: of the matrix
            bias: whether there is one; zero until it is loaded
            tied_to: an embedding whose rows are this layer's weight, once `tie` is called
        """
        self.spec = spec
        self._tied_to = tied_to
        self._parts: dict[str, StoredTensor] = {}
        self._matrix: WeightFormat | None = None
        self.decoded: frozenset[str] = frozenset()
        """What its parts were stored as, where no kernel multiplies that and the matrix is larger than in the file."""
        options = spec.options
        self.bias = torch.zeros(spec.out_features, dtype=options.dtype, device=options.device) if bias else None

    @property
    def matrix(self) -> WeightFormat:
        """Once all parts are loaded."""
        assert self._matrix is not None, f"{self.spec.name} has no values"
        return self._matrix

    def load(self, part: str, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [rows of the part, in_features] as that part; the last one builds the matrix."""
        self._parts[part] = stored
        if len(self._parts) == len(self.spec.parts):
            self._matrix, parts, self._parts = build_matrix(self.spec, self._parts), self._parts, {}
            for stored in parts.values():
                stored.release()
            if not isinstance(self._matrix, Packed):
                self.decoded = frozenset(part.format for part in parts.values() if part.decode is not None)

    def load_bias(self, part: str, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [rows of the part] as that part of the bias."""
        assert self.bias is not None
        self.bias[self.spec.rows_of(part)] = stored.values()

    def tie(self) -> None:
        """The embedding that this layer is tied to is loaded: take its values."""
        if self._tied_to is not None:
            self._matrix = build_tied_matrix(self.spec, self._tied_to.matrix)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, in_features] -> [rows, out_features], x's dtype; written to `out` where that is given."""
        assert self._matrix is not None
        return self._matrix.multiply(x, self.bias, out)


class Embedding:
    """Rows of a matrix [vocab_size, hidden], looked up by token."""

    def __init__(self, spec: MatrixSpec) -> None:
        """Without values."""
        self.spec = spec
        self._matrix: Packed | Dense | None = None

    @property
    def matrix(self) -> Packed | Dense:
        """Once it is loaded."""
        assert self._matrix is not None, "the embedding has no values"
        return self._matrix

    def load(self, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [vocab_size, hidden]."""
        self._matrix = build_embedding(self.spec, stored)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[n, hidden] of int64 `token_ids` [n]."""
        assert self._matrix is not None
        return self._matrix.rows(token_ids)
