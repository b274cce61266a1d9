"""The compiled attention kernels: `native_attention.c` for one type of activations, one of pages, and one head size."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import attention_unit
from cascade_llm.errors import BackendError
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache

__all__ = [
    "TASK_FIELDS",
    "LayerPages",
    "LevelColumns",
    "PlanColumns",
    "SharedOut",
    "kernels_for",
    "reasons_against_native",
]

ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
PAGES = {**ELEMENTS, torch.float16: "float16", torch.float8_e4m3fn: "float8", torch.int8: "int8"}
MAX_HEAD_DIM = 256
"""A block of queries lies on its thread's stack: 0.7 MB in float32 at this size."""
MAX_GROUP_SIZE = 192
"""Query heads per KV head that a task can hold: MAX_QUERIES of native_tasks.h."""
TASK_FIELDS = 6
"""int64 numbers that `task` of native_tasks.h holds."""

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class LevelColumns(ctypes.Structure):
    """`level` of native_pieces.h: addresses of the columns of a `CascadeLevel`."""

    _fields_ = (
        ("qo_indptr", _pointer),
        ("kv_page_indptr", _pointer),
        ("kv_page_indices", _pointer),
        ("kv_last_page_len", _pointer),
        ("num_segments", _long),
    )


class PlanColumns(ctypes.Structure):
    """`plan` of native_pieces.h."""

    _fields_ = (
        ("levels", _pointer),
        ("num_levels", _long),
        ("page_size", _long),
        ("window_len", _long),
        ("num_qo_heads", _long),
        ("num_kv_heads", _long),
        ("score_scale", ctypes.c_double),
        ("soft_cap", ctypes.c_double),
    )


class SharedOut(ctypes.Structure):
    """`shared_out` of the C file: a step's plan, and the tasks that it was cut into."""

    _fields_ = (
        ("plan", _pointer),
        ("tasks", _pointer),
        ("num_tasks", _long),
        ("threads", _long),
        ("partials", _pointer),
    )


class LayerPages(ctypes.Structure):
    """`pages` of native_slots.h: one layer's pool."""

    _fields_ = (
        ("k", _pointer),
        ("v", _pointer),
        ("k_scales", _pointer),
        ("v_scales", _pointer),
        ("k_scale", ctypes.c_float),
        ("v_scale", ctypes.c_float),
    )

    @classmethod
    def of(cls, kv_cache: PagedKVCache, layer: int) -> LayerPages:
        """Addresses in a pool, which must outlive them."""
        k_pool, v_pool = kv_cache.layer(layer)
        own_scales = kv_cache.vector_scales(layer)
        addresses = (None, None) if own_scales is None else [x.data_ptr() for x in own_scales]
        return cls(k_pool.data_ptr(), v_pool.data_ptr(), *addresses, *kv_cache.scales[layer])


def reasons_against_native(spec: AttentionSpec) -> list[str]:
    """Why the compiled kernels cannot serve this model here; empty where they can."""
    reasons = []
    if spec.device.type != "cpu":
        reasons.append(f"is for the CPU, the device is {spec.device.type}")
    if spec.page_dtype not in PAGES:
        reasons.append(f"reads no pages of {spec.page_dtype}: leave out kv_cache_dtype")
    if spec.dtype not in ELEMENTS:
        reasons.append(f"computes in float32 and bfloat16, not {str(spec.dtype).removeprefix('torch.')}")
    if spec.head_dim % 2 or not 0 < spec.head_dim <= MAX_HEAD_DIM:
        reasons.append(f"head_dim is {spec.head_dim}: it must be even and at most {MAX_HEAD_DIM}")
    if spec.num_qo_heads % spec.num_kv_heads:
        reasons.append(f"{spec.num_qo_heads} query heads cannot be shared out over {spec.num_kv_heads} KV heads")
    if spec.group_size > MAX_GROUP_SIZE:
        reasons.append(f"{spec.group_size} query heads per KV head are more than {MAX_GROUP_SIZE}")
    if spec.sm_scale <= 0:
        reasons.append(f"sm_scale is {spec.sm_scale}: it must be positive")
    if not reasons:
        try:
            kernels_for(spec.dtype, spec.page_dtype, spec.head_dim)
        except BackendError as error:
            reasons.append(str(error))
    return reasons


@functools.cache
def kernels_for(dtype: torch.dtype, page_dtype: torch.dtype, head_dim: int) -> Mapping[str, NativeFunction]:
    """The functions for these types and head size, by the names that the C file has for them.

    Raises:
        BackendError: the machine cannot compile or load them
    """
    functions = native_functions(attention_unit(ELEMENTS[dtype], PAGES[page_dtype], head_dim))
    functions["plan_tasks"].declare(_pointer, _long, _long, _pointer, _long, _pointer, returns=_long)
    functions["attend"].declare(*[_pointer] * 3, _long, *[_pointer] * 3)
    functions["write_slots"].declare(*[_pointer] * 3, _long, _long, _pointer, _long, _long)
    return functions
