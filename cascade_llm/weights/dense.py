"""Values as they are, row by row: any dtype, any device; what other formats are compared with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F

from cascade_llm.device.devices import thread_limit
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat

__all__ = ["Dense", "dense_values"]


class Dense(WeightFormat):
    """A plain tensor."""

    name = "dense"

    def __init__(self, values: torch.Tensor) -> None:
        """`values`: [out_features, in_features], not copied."""
        self.values = values

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
        with thread_limit(1):  # torch's threads would spin after it, where ours have the next loop to share
            return F.embedding(ids, self.values)

    @property
    def num_bytes(self) -> int:
        """See `WeightFormat`."""
        return self.values.nbytes


def dense_values(spec: MatrixSpec, parts: Mapping[str, StoredTensor]) -> torch.Tensor:
    """The values of all parts below each other, [out_features, in_features] in new memory of the products' dtype."""
    options = spec.options
    values = torch.empty(spec.out_features, spec.in_features, dtype=options.dtype, device=options.device)
    for name, stored in parts.items():
        stored.write_to(values[spec.rows_of(name)])
    return values
