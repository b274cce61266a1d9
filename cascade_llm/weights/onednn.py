"""oneDNN's own blocked layout, for float32 and bfloat16 on a CPU.

It pays at every number of rows that was measured (1 to 2048): `F.linear` reorders the weight again at each call, or
hands float32 to a slower library.
"""

from __future__ import annotations

import math

import torch

from cascade_llm.weights.dense import Dense
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat

__all__ = ["OneDNN"]


class OneDNN(WeightFormat):
    """Dense until `pack()`, which drops the dense values unless somebody else reads them too: a tied embedding."""

    name = "onednn"

    def __init__(self, spec: MatrixSpec, dense: Dense | None = None) -> None:
        """`dense`: what is loaded and then packed; default its own memory."""
        self.spec = spec
        self._dense: Dense | None = dense or Dense(spec)
        self._packed: torch.Tensor | None = None

    @staticmethod
    def reasons_against(spec: MatrixSpec) -> list[str]:
        """The device, the dtype, or a torch that was built without oneDNN."""
        options = spec.options
        if options.on_stream:
            return ["oneDNN multiplies on the host, and products are queued on a stream"]
        if options.device.type != "cpu":
            return [f"oneDNN serves the CPU, the device is {options.device.type}"]
        if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
            return ["this torch was built without oneDNN"]
        if options.dtype not in (torch.float32, torch.bfloat16):
            return [f"oneDNN packs float32 and bfloat16, not {str(options.dtype).removeprefix('torch.')}"]
        if options.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return ["oneDNN has no bfloat16 for this processor"]
        return []

    @property
    def packed(self) -> torch.Tensor | None:
        """oneDNN's own tensor of [out_features, in_features], which torch cannot index; None before `pack()`."""
        return self._packed

    def load(self, part: str, stored: StoredTensor) -> None:
        """See `WeightFormat`."""
        assert self._dense is not None, "parts are loaded before pack()"
        self._dense.load(part, stored)

    def pack(self) -> None:
        """See `WeightFormat`."""
        if self._dense is not None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._dense.values)
            self._dense = None

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `WeightFormat`; oneDNN makes its own memory, so `out` costs a copy."""
        if self._dense is not None:
            return self._dense.multiply(x, bias, out)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return y if out is None else out.copy_(y)

    @property
    def num_bytes(self) -> int:
        """See `WeightFormat`."""
        return math.prod((self.spec.out_features, self.spec.in_features, self.spec.options.dtype.itemsize))
