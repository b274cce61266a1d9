"""The two ends of a block of experts in C, for the CPU: a call each, in place of a dozen operations of torch."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch

from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import routing_unit
from cascade_llm.errors import BackendError
from cascade_llm.layers.routing import RoutedRows, Router, Routing, TorchRouter

__all__ = ["NativeRouter", "select_router"]

ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class NativeRouter(Router):
    """Compiled for one dtype, float32 or bfloat16; tensors must be on the CPU and of that dtype."""

    name = "native"

    def __init__(self, dtype: torch.dtype) -> None:
        """Load; raises `BackendError` with the reason where that is not possible."""
        self.dtype = dtype
        functions = _compiled(dtype)
        self._route, self._combine = functions["route_rows"], functions["combine_rows"]

    def route(self, logits: torch.Tensor, routing: Routing) -> RoutedRows:
        """See `Router`."""
        logits = logits.contiguous()
        rows, (experts, chosen) = len(logits), (routing.num_experts, routing.num_chosen)
        assert logits.dtype == self.dtype
        assert logits.shape[1] == experts
        integers = torch.empty(2 * rows * chosen + experts, dtype=torch.int64)
        sources, places, starts = integers.split_with_sizes((rows * chosen, rows * chosen, experts))
        routed = RoutedRows(
            sources,
            torch.empty(experts, dtype=torch.int32),
            places.view(rows, chosen),
            torch.empty(rows, chosen, dtype=torch.float32),
        )
        self._route(
            logits.data_ptr(),
            rows,
            experts,
            chosen,
            routing.divides_by_sum,
            sources.data_ptr(),
            routed.ends.data_ptr(),
            places.data_ptr(),
            routed.weights.data_ptr(),
            starts.data_ptr(),
        )
        return routed

    def combine(self, outputs: torch.Tensor, routed: RoutedRows) -> torch.Tensor:
        """See `Router`."""
        assert outputs.is_contiguous()
        assert outputs.dtype == self.dtype
        (rows, chosen), size = routed.places.shape, outputs.shape[1]
        out = outputs.new_empty(rows, size)
        self._combine(
            outputs.data_ptr(),
            routed.places.data_ptr(),
            routed.weights.data_ptr(),
            out.data_ptr(),
            rows,
            chosen,
            size,
            torch.get_num_threads(),
        )
        return out


def select_router(dtype: torch.dtype, device: torch.device, *, on_stream: bool = False) -> Router:
    """The fastest that works here."""
    if device.type != "cpu" or on_stream:
        return TorchRouter()
    try:
        return NativeRouter(dtype)
    except BackendError:
        return TorchRouter()


@functools.cache
def _compiled(dtype: torch.dtype) -> Mapping[str, NativeFunction]:
    """The functions for one dtype, with the types of their arguments."""
    if dtype not in ELEMENTS:
        raise BackendError(f"native routing is for float32 and bfloat16, not {str(dtype).removeprefix('torch.')}")
    functions = native_functions(routing_unit(ELEMENTS[dtype]))
    functions["route_rows"].declare(_pointer, *[_long] * 3, _int, *[_pointer] * 5)
    functions["combine_rows"].declare(*[_pointer] * 4, *[_long] * 3, _int)
    return functions
