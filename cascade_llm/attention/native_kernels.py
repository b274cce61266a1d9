"""The compiled attention kernels: `native_attention.c` for one element type and head size."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.device.native_library import NativeFunction, native_functions
from cascade_llm.device.native_units import attention_unit
from cascade_llm.errors import BackendError

__all__ = ["TASK_FIELDS", "LevelColumns", "PlanColumns", "kernels_for", "reasons_against_native"]

ELEMENTS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MAX_HEAD_DIM = 256
"""A block of queries lies on its thread's stack: 0.7 MB in float32 at this size."""
MAX_GROUP_SIZE = 192
"""Query heads per KV head that a task can hold: MAX_QUERIES in the C file."""
TASK_FIELDS = 6
"""int64 numbers that `task` of the C file holds."""

_pointer, _long = ctypes.c_void_p, ctypes.c_int64


class LevelColumns(ctypes.Structure):
    """`level` of the C file: addresses of the columns of a `CascadeLevel`."""

    _fields_ = (
        ("qo_indptr", _pointer),
        ("kv_page_indptr", _pointer),
        ("kv_page_indices", _pointer),
        ("kv_last_page_len", _pointer),
        ("num_segments", _long),
    )


class PlanColumns(ctypes.Structure):
    """`plan` of the C file."""

    _fields_ = (
        ("levels", _pointer),
        ("num_levels", _long),
        ("page_size", _long),
        ("window_len", _long),
        ("num_qo_heads", _long),
        ("num_kv_heads", _long),
        ("score_scale", ctypes.c_double),
    )


def reasons_against_native(spec: AttentionSpec) -> list[str]:
    """Why the compiled kernels cannot serve this model here; empty where they can."""
    reasons = []
    if spec.device.type != "cpu":
        reasons.append(f"is for the CPU, the device is {spec.device.type}")
    if spec.page_dtype != spec.dtype:
        reasons.append(f"reads pages of the model's dtype, not {spec.page_dtype}: leave out kv_cache_dtype")
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
            kernels_for(spec.dtype, spec.head_dim)
        except BackendError as error:
            reasons.append(str(error))
    return reasons


@functools.cache
def kernels_for(dtype: torch.dtype, head_dim: int) -> Mapping[str, NativeFunction]:
    """The functions for one dtype and head size, by the names that the C file has for them.

    Raises:
        BackendError: the machine cannot compile or load them
    """
    functions = native_functions(attention_unit(ELEMENTS[dtype], head_dim))
    functions["plan_tasks"].argtypes = (_pointer, _long, _long, _pointer, _long, _pointer)
    functions["plan_tasks"].restype = _long
    functions["attend"].argtypes = (*[_pointer] * 2, _long, _long, *[_pointer] * 3, _long, *[_pointer] * 4)
    functions["attend"].restype = None
    functions["write_slots"].argtypes = (*[_pointer] * 4, _long, _long, _pointer, _long, _long)
    functions["write_slots"].restype = None
    return functions
