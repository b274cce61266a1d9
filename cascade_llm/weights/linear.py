"""Layers that hold a matrix: y = x Wᵀ + b, and the rows of an embedding."""

from __future__ import annotations

import torch

from cascade_llm.device.ranks import Ranks
from cascade_llm.weights.dense import Dense
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat
from cascade_llm.weights.packed import Packed
from cascade_llm.weights.select import build_embedding, build_matrix, build_tied_matrix

__all__ = ["Embedding", "Linear"]


class Linear:
    """A linear layer without gradients: a matrix in the format that `weights.select` chooses, and a bias."""

    def __init__(
        self, spec: MatrixSpec, *, bias: bool = False, tied_to: Embedding | None = None, ranks: Ranks | None = None
    ) -> None:
        """Without values.

        Args:
            spec: of the matrix
            bias: whether there is one; zero until it is loaded
            tied_to: an embedding whose rows are this layer's weight, once `tie` is called
            ranks: whose products are summed, where the spec gives each some of the inputs
        """
        self.spec, self.held = spec, spec.held
        self._ranks, self._is_summed = ranks or Ranks(), spec.inputs is not None
        self._tied_to = tied_to
        self._parts: dict[str, StoredTensor] = {}
        self._matrix: WeightFormat | None = None
        self.decoded: frozenset[str] = frozenset()
        """What its parts were stored as, where no kernel multiplies that and the matrix is larger than in the file."""
        options = spec.options
        self.bias = torch.zeros(self.held.out_features, dtype=options.dtype, device=options.device) if bias else None

    @property
    def matrix(self) -> WeightFormat:
        """Once all parts are loaded."""
        assert self._matrix is not None, f"{self.spec.name} has no values"
        return self._matrix

    def load(self, part: str, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [rows of the part, in_features] as that part; the last one builds the matrix."""
        self._parts[part] = self.spec.held_part(part, stored)
        if len(self._parts) == len(self.spec.parts):
            self._matrix, parts, self._parts = build_matrix(self.held, self._parts), self._parts, {}
            for stored in parts.values():
                stored.release()
            if not isinstance(self._matrix, Packed):
                self.decoded = frozenset(part.format for part in parts.values() if part.decode is not None)

    def load_bias(self, part: str, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [rows of the part] as that part of the bias."""
        assert self.bias is not None
        if self._ranks.is_first or not self._is_summed:  # a sum has it once
            self.bias[self.held.rows_of(part)] = self.spec.held_part(part, stored).values()

    def tie(self) -> None:
        """The embedding that this layer is tied to is loaded: take its values."""
        if self._tied_to is not None:
            self._matrix = build_tied_matrix(self.held, self._tied_to.matrix)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, in_features] -> [rows, out_features], x's dtype; written to `out` where that is given."""
        assert self._matrix is not None
        y = self._matrix.multiply(x, self.bias, out)
        return self._ranks.all_reduce(y) if self._is_summed else y


class Embedding:
    """Rows of a matrix [vocab_size, hidden], looked up by token."""

    def __init__(self, spec: MatrixSpec, ranks: Ranks | None = None) -> None:
        """Without values. `ranks`: that look up some rows each, where the spec says so."""
        self.spec, self.held, self._ranks = spec, spec.held, ranks or Ranks()
        (self._part,) = spec.parts
        self._rows = spec.outputs.get(self._part)
        self._matrix: Packed | Dense | None = None

    @property
    def matrix(self) -> Packed | Dense:
        """Once it is loaded."""
        assert self._matrix is not None, "the embedding has no values"
        return self._matrix

    def load(self, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [vocab_size, hidden]."""
        self._matrix = build_embedding(self.held, self.spec.held_part(self._part, stored))

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[n, hidden] of int64 `token_ids` [n]."""
        assert self._matrix is not None
        if self._rows is None:
            return self._matrix.rows(token_ids)
        own = token_ids - self._rows.first
        is_missing = (own < 0) | (own >= self._rows.size)
        found = self._matrix.rows(own.masked_fill(is_missing, 0)).masked_fill(is_missing.unsqueeze(1), 0)
        return self._ranks.all_reduce(found)
