"""y = x Wᵀ + b, with the weight in the layout that the processor reads fastest."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cascade_llm.weights.blocked_product import BlockedProduct
from cascade_llm.weights.int4 import MAX_ROWS as MAX_INT4_ROWS
from cascade_llm.weights.int4 import Int4Weight

__all__ = ["Linear", "can_pack"]


def can_pack(weight: torch.Tensor) -> bool:
    """Whether oneDNN takes this weight in its own blocked layout.

    Packing pays at every number of rows that was measured (1 to 2048), in bfloat16 and in float32: `F.linear` reorders
    the weight again at each call, or hands float32 to a slower library.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


class Linear:
    """A linear layer without gradients.

    `weight` is [out_features, in_features]; loaders write into it. `pack()`, called once after loading, moves it into
    oneDNN's layout where that is possible and drops the dense one. `quantize()`, called before it, adds an int4 copy
    for few rows; many rows still read the dense weight, which then holds the values of the copy, so that both give the
    same product up to rounding.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        device: torch.device,
        loading_dtype: torch.dtype | None = None,
    ) -> None:
        """`loading_dtype`: of the weight until `quantize()`, where the checkpoint says more than `dtype` holds."""
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.weight = torch.empty(out_features, in_features, dtype=loading_dtype or dtype, device=device)
        self.bias = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self._packed: torch.Tensor | None = None
        self._blocked: BlockedProduct | None = None
        self._int4: Int4Weight | None = None

    @property
    def is_packed(self) -> bool:
        """Whether the dense weight is gone."""
        return self._packed is not None

    def quantize(self) -> None:
        """Round the weight to int4, and serve few rows from four bits a weight; may be called once, before `pack()`."""
        assert not self.is_packed
        self._int4, values = Int4Weight.quantize(self.weight)
        self.weight = values.to(self.dtype)

    def pack(self) -> None:
        """Move the weight into the processor's layout; `weight` is empty afterwards, and cannot be loaded again."""
        if self.is_packed or not can_pack(self.weight):
            return
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight)
        self._blocked = BlockedProduct.for_weight(self._packed, self.weight)
        self.weight = self.weight.new_empty(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] -> [rows, out_features], x's dtype."""
        num_rows = x.shape[0]
        if self._int4 is not None and num_rows <= MAX_INT4_ROWS:
            few = self._int4.matmul(x.contiguous())
            return few if self.bias is None else few.add_(self.bias)
        if self._blocked is not None and self._blocked.serves(num_rows):
            return self._blocked(x.contiguous(), self.bias)
        if self._packed is None:
            return F.linear(x, self.weight, self.bias)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")
        return y

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """The product, into memory that is there: [rows, in_features] -> `out` [rows, out_features]."""
        if self._int4 is None and self._packed is None and self.bias is None:
            torch.mm(x, self.weight.t(), out=out)
        else:
            out.copy_(self(x))
