"""x Wᵀ + b by compiled C, over a weight in oneDNN's own packed layout: most of a step on a CPU.

oneDNN spends 9 µs on each call before it multiplies, a fifth of a step of one request, and for some tens of rows it
waits for memory and then computes, one after the other. This kernel computes with a block of weights while it asks for
the next. It reads what oneDNN packed, so nothing is kept twice. Whether the weight lies as the kernel believes is
compared, byte by byte, when it is packed; where it does not, oneDNN serves.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from cascade_llm.device.c_compiler import compile_library
from cascade_llm.errors import BackendError

__all__ = ["BlockedProduct"]

SOURCE = Path(__file__).with_suffix(".c")
FEW_ROWS, LONG_INPUT = 64, 4096
"""With more rows than the one and more inputs than the other, oneDNN is as fast or faster: a block of weights is then
more than the second-level cache holds beside the rows."""
BLOCK_LEN = 64
"""Outputs that lie together in oneDNN's layout for AVX512-BF16."""
INPUT_MULTIPLE = 4


class BlockedProduct:
    """x Wᵀ + b for bfloat16 rows, with a weight that oneDNN has packed and somebody else keeps alive."""

    def __init__(self, kernel: ctypes._NamedFuncPointer, address: int, in_features: int, out_features: int) -> None:
        self._kernel, self._address = kernel, address
        self._in_features, self._out_features = in_features, out_features

    @classmethod
    def for_weight(cls, packed: torch.Tensor, weight: torch.Tensor) -> BlockedProduct | None:
        """The kernel for a weight [out_features, in_features] and its packed copy; None where it cannot serve."""
        out_features, in_features = weight.shape
        if weight.dtype != torch.bfloat16 or out_features % BLOCK_LEN or in_features % INPUT_MULTIPLE:
            return None
        kernel = _compiled()
        address: int = torch.ops.mkldnn.data_ptr(packed)
        if kernel is None or not _is_blocked(address, weight):
            return None
        return cls(kernel, address, in_features, out_features)

    def serves(self, num_rows: int) -> bool:
        """Whether it is faster than oneDNN for so many rows."""
        return num_rows > 0 and (num_rows <= FEW_ROWS or self._in_features <= LONG_INPUT)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """[rows, in_features] -> [rows, out_features]; x contiguous, at least a row."""
        assert x.is_contiguous()
        assert x.dtype == torch.bfloat16
        rows, in_features = x.shape
        assert in_features == self._in_features
        y = x.new_empty(rows, self._out_features)
        self._kernel(
            x.data_ptr(),
            self._address,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            rows,
            in_features,
            self._out_features,
            torch.get_num_threads(),
        )
        return y


def _is_blocked(address: int, weight: torch.Tensor) -> bool:
    """Whether the memory at `address` holds the weight as [out / 64][in / 2][64][2]."""
    memory = (ctypes.c_int16 * weight.numel()).from_address(address)
    lies = torch.frombuffer(memory, dtype=torch.int16)
    out_features, in_features = weight.shape
    blocks = weight.view(torch.int16).view(out_features // BLOCK_LEN, BLOCK_LEN, in_features // 2, 2)
    return torch.equal(lies.view(-1, in_features // 2, BLOCK_LEN, 2), blocks.transpose(1, 2))


@functools.cache
def _compiled() -> ctypes._NamedFuncPointer | None:
    """The kernel, compiled once per process; None where there is no compiler or no AVX512-BF16."""
    try:
        kernel = compile_library(SOURCE, ()).blocked_product
    except BackendError:
        return None
    pointer, long = ctypes.c_void_p, ctypes.c_long
    kernel.argtypes = (*[pointer] * 4, *[long] * 3, ctypes.c_int)
    kernel.restype = None
    return kernel
