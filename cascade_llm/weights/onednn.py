"""oneDNN's own blocked layout, for float32 and bfloat16 on a CPU.

It pays at every number of rows that was measured (1 to 2048): `F.linear` reorders the weight again at each call, or
hands float32 to a slower library.
"""

from __future__ import annotations

import torch

from cascade_llm.device.huge_pages import MemoryRange
from cascade_llm.weights.format import MatrixSpec, WeightFormat

__all__ = ["OneDNN"]


class OneDNN(WeightFormat):
    """A matrix that oneDNN has packed."""

    name = "onednn"

    def __init__(self, values: torch.Tensor) -> None:
        """`values`: [out_features, in_features]; packing copies them."""
        self.packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(values)
        """oneDNN's own tensor, which torch cannot index."""
        self._num_bytes = values.nbytes

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

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `WeightFormat`; oneDNN makes its own memory, so `out` costs a copy."""
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        return y if out is None else out.copy_(y)

    @property
    def num_bytes(self) -> int:
        """See `WeightFormat`."""
        return self._num_bytes

    @property
    def memory(self) -> tuple[MemoryRange, ...]:
        """See `WeightFormat`."""
        return (MemoryRange(torch.ops.mkldnn.data_ptr(self.packed), self._num_bytes),)
