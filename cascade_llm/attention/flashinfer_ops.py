"""The one door to FlashInfer: what the engine calls of it, whether it can be used, and why not.

Nothing here imports FlashInfer before it is asked to: importing this module costs nothing. Everything else takes a
`FlashInferOps`, so that a test double can stand in for the package.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.errors import BackendError

__all__ = ["TESTED_VERSIONS", "FlashInferOps", "load_flashinfer_ops", "reasons_against_flashinfer"]

TESTED_VERSIONS = ("0.7.2.post1",)
HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
MERGE_THREADS = 1024
"""`merge_state` gives a row one thread per 8 elements of its output, all in one block."""


@dataclass(frozen=True, kw_only=True)
class FlashInferOps:
    """The FlashInfer calls that the engine makes, under FlashInfer's own names."""

    BatchPrefillWithPagedKVCacheWrapper: Callable[..., Any]
    BatchDecodeWithPagedKVCacheWrapper: Callable[..., Any]
    merge_state_in_place: Callable[..., Any]
    append_paged_kv_cache: Callable[..., Any]
    rmsnorm: Callable[..., Any]
    fused_add_rmsnorm: Callable[..., Any]
    silu_and_mul: Callable[..., Any]
    apply_rope_with_cos_sin_cache_inplace: Callable[..., Any]


def load_flashinfer_ops() -> FlashInferOps:
    """Import FlashInfer. Raises `BackendError` where it is not installed."""
    try:
        import flashinfer
        from flashinfer.activation import silu_and_mul
        from flashinfer.norm import fused_add_rmsnorm, rmsnorm
        from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace
    except ImportError as error:
        raise BackendError(f"FlashInfer cannot be imported ({error}): pip install 'cascade-llm[cuda]'") from error
    return FlashInferOps(
        BatchPrefillWithPagedKVCacheWrapper=flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        BatchDecodeWithPagedKVCacheWrapper=flashinfer.BatchDecodeWithPagedKVCacheWrapper,
        merge_state_in_place=flashinfer.merge_state_in_place,
        append_paged_kv_cache=flashinfer.append_paged_kv_cache,
        rmsnorm=rmsnorm,
        fused_add_rmsnorm=fused_add_rmsnorm,
        silu_and_mul=silu_and_mul,
        apply_rope_with_cos_sin_cache_inplace=apply_rope_with_cos_sin_cache_inplace,
    )


def reasons_against_flashinfer(spec: AttentionSpec) -> list[str]:
    """Everything that speaks against FlashInfer for this model on this device; nothing where it can serve."""
    return [*_device_reasons(spec.device), *_package_reasons(), *shape_reasons(spec)]


def shape_reasons(spec: AttentionSpec) -> list[str]:
    """What speaks against FlashInfer in the model alone."""
    reasons = []
    if spec.dtype not in DTYPES:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        reasons.append(f"its kernels compute in {names}, not {str(spec.dtype).removeprefix('torch.')}")
    if spec.head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim is {spec.head_dim}, its kernels take {', '.join(map(str, HEAD_DIMS))}")
    if spec.num_qo_heads % spec.num_kv_heads:
        reasons.append(f"{spec.num_qo_heads} query heads cannot be shared out over {spec.num_kv_heads} KV heads")
    if spec.num_qo_heads * spec.head_dim // 8 > MERGE_THREADS:
        limit = MERGE_THREADS * 8 // spec.head_dim
        reasons.append(f"{spec.num_qo_heads} query heads of {spec.head_dim}: merge_state takes {limit} at most")
    return reasons


def _device_reasons(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return [f"needs a CUDA GPU, the device is {device.type}"]
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return [f"needs compute capability 8.0 or newer, the GPU has {capability[0]}.{capability[1]}"]
    return []


def _package_reasons() -> list[str]:
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return ["flashinfer-python is not installed (pip install 'cascade-llm[cuda]')"]
    if version not in TESTED_VERSIONS:
        return [f"flashinfer-python {version} is untested here, use {' or '.join(TESTED_VERSIONS)}"]
    return []
