"""Values as they are, row by row: any dtype, any device; what other formats are loaded in and compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat

__all__ = ["Dense"]


class Dense(WeightFormat):
    """A plain tensor; the only format that rows are looked up in, so embeddings have it."""

    name = "dense"

    def __init__(self, spec: MatrixSpec, dtype: torch.dtype | None = None) -> None:
        """Memory without values; `dtype` is the products' by default."""
        self.spec = spec
        self.values = torch.empty(
            spec.out_features, spec.in_features, dtype=dtype or spec.options.dtype, device=spec.options.device
        )
        """[out_features, in_features]"""

    @staticmethod
    def reasons_against(spec: MatrixSpec) -> list[str]:
        """None."""
        return []

    def load(self, part: str, stored: StoredTensor) -> None:
        """See `WeightFormat`; converts the dtype."""
        stored.write_to(self.values[self.spec.rows_of(part)])

    def pack(self) -> None:
        """Nothing: this is its form."""

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `WeightFormat`."""
        if out is None:
            return F.linear(x, self.values, bias)
        if bias is None:
            return torch.mm(x, self.values.t(), out=out)
        return torch.addmm(bias, x, self.values.t(), out=out)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows [n, in_features] of int64 `ids` [n]."""
        return F.embedding(ids, self.values)

    @property
    def num_bytes(self) -> int:
        """See `WeightFormat`."""
        return self.values.nbytes
