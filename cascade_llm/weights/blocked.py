"""Our own product in C for bfloat16, over oneDNN's packed layout: most of a step on a CPU with AVX512-BF16.

oneDNN spends 9 µs on each call before it multiplies, a fifth of a step of one request, and for some tens of rows it
waits for memory and then computes, one after the other. This kernel computes with a block of weights while it asks for
the next. It reads what oneDNN packed, so nothing is kept twice. Whether the weight lies as the kernel believes is
compared, byte by byte, when it is packed; where it does not, oneDNN serves.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from cascade_llm.device.huge_pages import MemoryRange
from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import BLOCKED
from cascade_llm.errors import BackendError
from cascade_llm.weights.format import MatrixSpec, WeightFormat
from cascade_llm.weights.onednn import OneDNN

__all__ = ["Blocked"]

FEW_ROWS = 64
LONG_INPUTS = {64: 4096, 32: 2048}
"""Outputs that lie together in oneDNN's layouts, the one for AVX512-BF16 and the one for AMX. With more than `FEW_ROWS`
rows and more inputs than this, oneDNN is as fast or faster: a block of weights is then more than the second-level cache
holds beside the rows."""
OUTPUT_MULTIPLE = 64
INPUT_MULTIPLE = 4


class Blocked(WeightFormat):
    """oneDNN's packed weight, which our kernel multiplies for the numbers of rows where it is faster."""

    name = "blocked"

    def __init__(self, values: torch.Tensor) -> None:
        """`values`: bfloat16 [out_features, in_features]; oneDNN serves alone where it packs them in another layout."""
        self._out_features, self._in_features = values.shape
        self._onednn = OneDNN(values)
        kernel = _compiled()
        assert not isinstance(kernel, str), kernel
        self._kernel = kernel
        address: int = torch.ops.mkldnn.data_ptr(self._onednn.packed)
        self._address = address
        self._block_len = next((length for length in LONG_INPUTS if is_blocked(address, values, length)), None)

    @staticmethod
    def reasons_against(spec: MatrixSpec) -> list[str]:
        """oneDNN's own reasons, the dtype, the shape, the processor or a compiler that is missing."""
        if reasons := OneDNN.reasons_against(spec):
            return reasons
        if spec.options.dtype != torch.bfloat16:
            return [f"the kernel is for bfloat16, not {str(spec.options.dtype).removeprefix('torch.')}"]
        if spec.out_features % OUTPUT_MULTIPLE or spec.in_features % INPUT_MULTIPLE:
            return [
                f"{spec.name} is {spec.out_features} x {spec.in_features}, the kernel takes multiples of "
                f"{OUTPUT_MULTIPLE} x {INPUT_MULTIPLE}"
            ]
        kernel = _compiled()
        return [kernel] if isinstance(kernel, str) else []

    def serves(self, num_rows: int) -> bool:
        """Whether our kernel multiplies so many rows, and not oneDNN."""
        if self._block_len is None or num_rows == 0:
            return False
        return num_rows <= FEW_ROWS or self._in_features <= LONG_INPUTS[self._block_len]

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `WeightFormat`."""
        rows = x.shape[0]
        if not self.serves(rows):
            return self._onednn.multiply(x, bias, out)
        assert x.dtype == torch.bfloat16
        assert x.shape[1] == self._in_features
        x = x.contiguous()
        y = out if out is not None and out.is_contiguous() else x.new_empty(rows, self._out_features)
        self._kernel(
            x.data_ptr(),
            self._address,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
            self._in_features,
            self._out_features,
            self._block_len,
            torch.get_num_threads(),
        )
        return y if out is None or y is out else out.copy_(y)

    @property
    def num_bytes(self) -> int:
        """See `WeightFormat`."""
        return self._onednn.num_bytes

    @property
    def memory(self) -> tuple[MemoryRange, ...]:
        """See `WeightFormat`."""
        return self._onednn.memory


def is_blocked(address: int, weight: torch.Tensor, block_len: int) -> bool:
    """Whether the memory at `address` holds a bfloat16 weight [out, in] as [out / block_len][in / 2][block_len][2]."""
    memory = (ctypes.c_int16 * weight.numel()).from_address(address)
    lies = torch.frombuffer(memory, dtype=torch.int16)
    out_features, in_features = weight.shape
    blocks = weight.view(torch.int16).view(out_features // block_len, block_len, in_features // 2, 2)
    return torch.equal(lies.view(-1, in_features // 2, block_len, 2), blocks.transpose(1, 2))


@functools.cache
def _compiled() -> NativeFunction | str:
    """The kernel, or the reason why there is none."""
    try:
        kernel = native_functions(BLOCKED)["blocked_product"]
    except BackendError as error:
        return str(error)
    pointer, long = ctypes.c_void_p, ctypes.c_long
    kernel.declare(*[pointer] * 4, *[long] * 4, ctypes.c_int)
    return kernel
