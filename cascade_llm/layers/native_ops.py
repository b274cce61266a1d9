"""The elementwise operations in C, for the CPU: one pass over the data each.

On small models the glue between matrix products costs torch a quarter of a decode step: fifteen dispatches a layer,
each with a pass over the rows. `torch.compile` spends as much on guards as it saves. Here a layer makes four calls.

Where there is no native code, `TorchOps` does the same work.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch

from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import ops_unit
from cascade_llm.errors import BackendError
from cascade_llm.layers.fused_ops import FusedOps, HeadLayout, RMSNorm, TorchOps
from cascade_llm.layers.rope import Rotation

__all__ = ["NativeOps", "select_fused_ops"]

ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_pointer, _long, _float, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int


class NativeOps(FusedOps):
    """Compiled for one dtype, float32 or bfloat16; tensors must be on the CPU, of that dtype and contiguous."""

    name = "native"

    def __init__(self, dtype: torch.dtype) -> None:
        """Load; raises `BackendError` with the reason where that is not possible."""
        self.dtype = dtype
        functions = _compiled(dtype)
        self._add_rms_norm, self._rotate = functions["add_rms_norm"], functions["rotate"]
        self._silu_and_mul, self._gelu_tanh_and_mul = functions["silu_and_mul"], functions["gelu_tanh_and_mul"]
        self._clamped_swiglu = functions["clamped_swiglu"]

    def rms_norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `FusedOps`."""
        return self._normalised(x, None, norm)

    def add_rms_norm(self, residual: torch.Tensor, delta: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `FusedOps`."""
        assert delta.is_contiguous()
        assert delta.shape == residual.shape
        return self._normalised(residual, delta.data_ptr(), norm)

    def rotate(
        self, qkv: torch.Tensor, layout: HeadLayout, rotation: Rotation | None, norms: tuple[RMSNorm, RMSNorm] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `FusedOps`; q, k and v are views of `qkv`."""
        assert qkv.is_contiguous()
        assert qkv.dtype == self.dtype
        cos_sin = None if rotation is None else rotation.cos_sin
        assert cos_sin is None or cos_sin.shape[0] == qkv.shape[0]
        self._rotate(
            qkv.data_ptr(),
            None if cos_sin is None else cos_sin.data_ptr(),
            norms[0].weight.data_ptr() if norms else None,
            norms[1].weight.data_ptr() if norms else None,
            *qkv.shape,
            layout.num_qo_heads,
            layout.num_kv_heads,
            layout.head_dim,
            0 if cos_sin is None else cos_sin.shape[1],
            rotation is not None and rotation.is_interleaved,
            norms[0].eps if norms else 0.0,
            norms[0].offset if norms else 0.0,
            torch.get_num_threads(),
        )
        return layout.split(qkv)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `FusedOps`."""
        return self._gated(self._silu_and_mul, gate_up)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `FusedOps`."""
        return self._gated(self._gelu_tanh_and_mul, gate_up)

    def clamped_swiglu(self, gate_up: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
        """See `FusedOps`."""
        return self._gated(self._clamped_swiglu, gate_up, limit, alpha)

    def _gated(self, function: NativeFunction, gate_up: torch.Tensor, *constants: float) -> torch.Tensor:
        assert gate_up.is_contiguous()
        assert gate_up.dtype == self.dtype
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty(rows, size)
        function(gate_up.data_ptr(), out.data_ptr(), rows, size, *constants, torch.get_num_threads())
        return out

    def _normalised(self, residual: torch.Tensor, delta_pointer: int | None, norm: RMSNorm) -> torch.Tensor:
        assert residual.is_contiguous()
        assert residual.dtype == self.dtype
        out = torch.empty_like(residual)
        self._add_rms_norm(
            residual.data_ptr(),
            delta_pointer,
            norm.weight.data_ptr(),
            out.data_ptr(),
            *residual.shape,
            norm.eps,
            norm.offset,
            torch.get_num_threads(),
        )
        return out


def select_fused_ops(dtype: torch.dtype, device: torch.device) -> FusedOps:
    """The fastest that works here; a `TorchOps` that was not the first choice holds the reason."""
    if device.type != "cpu":
        return TorchOps(f"native operations are for the CPU, not {device.type}")
    try:
        return NativeOps(dtype)
    except BackendError as error:
        return TorchOps(str(error))


@functools.cache
def _compiled(dtype: torch.dtype) -> Mapping[str, NativeFunction]:
    """The functions for one dtype, with the types of their arguments."""
    if dtype not in ELEMENTS:
        raise BackendError(f"native operations are for float32 and bfloat16, not {str(dtype).removeprefix('torch.')}")
    functions = native_functions(ops_unit(ELEMENTS[dtype]))
    functions["add_rms_norm"].declare(*[_pointer] * 4, _long, _long, _float, _float, _int)
    functions["silu_and_mul"].declare(_pointer, _pointer, _long, _long, _int)
    functions["gelu_tanh_and_mul"].declare(_pointer, _pointer, _long, _long, _int)
    functions["clamped_swiglu"].declare(_pointer, _pointer, _long, _long, _float, _float, _int)
    functions["rotate"].declare(*[_pointer] * 4, *[_long] * 6, _int, _float, _float, _int)
    return functions
