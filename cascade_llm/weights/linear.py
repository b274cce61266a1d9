"""Layers that hold a matrix: y = x Wᵀ + b, and the rows of an embedding."""

from __future__ import annotations

import torch

from cascade_llm.weights.dense import Dense
from cascade_llm.weights.format import MatrixSpec, StoredTensor
from cascade_llm.weights.select import allocate_matrix

__all__ = ["Embedding", "Linear"]


class Linear:
    """A linear layer without gradients: a matrix in the format that `weights.select` chooses, and a bias."""

    def __init__(self, spec: MatrixSpec, *, bias: bool = False, tied_to: Embedding | None = None) -> None:
        """Memory without values.

        Args:
            spec: of the matrix
            bias: whether there is one; zero until it is loaded
            tied_to: an embedding whose rows are this layer's weight

        Raises:
            ConfigError: the options ask for a quantization that cannot hold the matrix
        """
        self.spec = spec
        self.matrix = allocate_matrix(spec, None if tied_to is None else tied_to.matrix)
        options = spec.options
        self.bias = torch.zeros(spec.out_features, dtype=options.dtype, device=options.device) if bias else None

    def load(self, part: str, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [rows of the part, in_features] as that part of the matrix."""
        self.matrix.load(part, stored)

    def load_bias(self, part: str, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [rows of the part] as that part of the bias."""
        assert self.bias is not None
        self.bias[self.spec.rows_of(part)] = stored.values()

    def pack(self) -> None:
        """Bring the loaded matrix into the form that multiplies fastest."""
        self.matrix.pack()

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[rows, in_features] -> [rows, out_features], x's dtype; written to `out` where that is given."""
        return self.matrix.multiply(x, self.bias, out)


class Embedding:
    """Rows of a matrix [vocab_size, hidden], looked up by token."""

    def __init__(self, spec: MatrixSpec) -> None:
        """Memory without values."""
        self.matrix = Dense(spec)

    def load(self, stored: StoredTensor) -> None:
        """Take a checkpoint's tensor [vocab_size, hidden]."""
        (part,) = self.matrix.spec.parts
        self.matrix.load(part, stored)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[n, hidden] of int64 `token_ids` [n]."""
        return self.matrix.rows(token_ids)
