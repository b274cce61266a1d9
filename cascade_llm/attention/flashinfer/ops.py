"""The one door to FlashInfer: what the engine calls of it, whether it can be used, and why not.

Nothing here imports FlashInfer before it is asked to: importing this module costs nothing. Everything else takes a
`FlashInferOps`, so that a test double can stand in for the package.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer.variants import kernel_variants
from cascade_llm.device.cuda_toolkit import find_nvcc
from cascade_llm.errors import BackendError

__all__ = [
    "TESTED_VERSIONS",
    "FlashInferOps",
    "JitModule",
    "jit_modules",
    "load_flashinfer_ops",
    "package_reasons",
    "shape_reasons",
]

TESTED_VERSIONS = ("0.7.2.post1",)
HEAD_DIMS = (64, 128, 256)
NO_FP8_HEAD_DIM = 64
"""A note in FlashInfer's source (attention/prefill.cuh) says so; not to be offered before a GPU has shown otherwise."""
DTYPES = (torch.bfloat16, torch.float16)
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
    gemma_rmsnorm: Callable[..., Any]
    gemma_fused_add_rmsnorm: Callable[..., Any]
    silu_and_mul: Callable[..., Any]
    apply_rope_with_cos_sin_cache_inplace: Callable[..., Any]


def load_flashinfer_ops(prebuilt: Path | None = None) -> FlashInferOps:
    """Import FlashInfer. Raises `BackendError` where it is not installed.

    Args:
        prebuilt: a folder of `<module>/<module>.so`; modules in it are loaded without a compiler
    """
    if find_nvcc() is not None or (prebuilt is not None and (prebuilt / "norm").exists()):
        # norms by CUDA: the package's own choice, a Python DSL, is compiled anew by each process
        os.environ.setdefault("FLASHINFER_USE_CUDA_NORM", "1")
    try:
        import flashinfer
        from flashinfer.activation import silu_and_mul
        from flashinfer.jit import env
        from flashinfer.norm import fused_add_rmsnorm, gemma_fused_add_rmsnorm, gemma_rmsnorm, rmsnorm
        from flashinfer.rope import apply_rope_with_cos_sin_cache_inplace
    except (ImportError, OSError, RuntimeError) as error:  # of its own, or of a CUDA library that it loads
        raise BackendError(f"FlashInfer cannot be imported ({error}): pip install 'cascade-llm[cuda]'") from error
    if prebuilt is not None:
        env.FLASHINFER_AOT_DIR = prebuilt
    return FlashInferOps(
        BatchPrefillWithPagedKVCacheWrapper=flashinfer.BatchPrefillWithPagedKVCacheWrapper,
        BatchDecodeWithPagedKVCacheWrapper=flashinfer.BatchDecodeWithPagedKVCacheWrapper,
        merge_state_in_place=flashinfer.merge_state_in_place,
        append_paged_kv_cache=flashinfer.append_paged_kv_cache,
        rmsnorm=rmsnorm,
        fused_add_rmsnorm=fused_add_rmsnorm,
        gemma_rmsnorm=gemma_rmsnorm,
        gemma_fused_add_rmsnorm=gemma_fused_add_rmsnorm,
        silu_and_mul=silu_and_mul,
        apply_rope_with_cos_sin_cache_inplace=apply_rope_with_cos_sin_cache_inplace,
    )


@dataclass(frozen=True)
class JitModule:
    """A module of kernels that FlashInfer compiles on first use."""

    name: str
    """FlashInfer's own, which says dtype and head size"""
    purpose: str
    build: Callable[[], None]
    """Compile it into FlashInfer's cache; a `RuntimeError` carries the compiler's output"""
    library: Path
    """Where it then is."""


def jit_modules(spec: AttentionSpec, kernels: Iterable[str]) -> list[JitModule]:
    """The modules that a model needs, as the engine calls them. FLASHINFER_CUDA_ARCH_LIST must be set before.

    Args:
        spec: the model; its device does not matter
        kernels: those that serve, see `serving_kernels`
    """
    from flashinfer.jit.activation import gen_act_and_mul_module
    from flashinfer.jit.attention.modules import (
        _gen_batch_prefill_primary_module,
        gen_batch_decode_module,
    )
    from flashinfer.jit.cascade import gen_cascade_module
    from flashinfer.jit.norm import gen_norm_module
    from flashinfer.jit.page import gen_page_module
    from flashinfer.jit.rope import gen_rope_module

    types, heads = (spec.dtype, spec.page_dtype, spec.dtype, torch.int32), (spec.head_dim, spec.head_dim)
    modules = []
    for needed in kernel_variants(spec, kernels):
        # no position encoding, a window or none, a soft cap or none
        shape = (*types, *heads, 0, needed.for_windows, spec.logits_soft_cap is not None)
        if needed.kernel == "decode_cuda_cores":
            modules.append((needed.purpose, gen_batch_decode_module(*shape)))
        else:
            modules.append((needed.purpose, _gen_batch_prefill_primary_module("fa2", *shape, False)))
    modules += [
        ("merging levels", gen_cascade_module()),
        ("appending to pages", gen_page_module()),
        ("rotary embedding", gen_rope_module()),
        ("norms", gen_norm_module()),
        ("gated activation", gen_act_and_mul_module("silu")),
    ]
    purposes: dict[str, list[str]] = {}
    for purpose, module in modules:
        purposes.setdefault(module.name, []).append(purpose)
    by_name = {module.name: module for _, module in modules}
    return [
        JitModule(name, ", ".join(purposes[name]), module.build, Path(module.jit_library_path))
        for name, module in by_name.items()
    ]


def package_reasons() -> list[str]:
    """What speaks against the installed package."""
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return ["flashinfer-python is not installed (pip install 'cascade-llm[cuda]')"]
    if version not in TESTED_VERSIONS:
        return [f"flashinfer-python {version} is untested here, use {' or '.join(TESTED_VERSIONS)}"]
    return []


def shape_reasons(spec: AttentionSpec) -> list[str]:
    """What speaks against FlashInfer in the model alone."""
    reasons = []
    if spec.dtype not in DTYPES:
        names = " and ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        reasons.append(f"its kernels compute in {names}, not {str(spec.dtype).removeprefix('torch.')}")
    if spec.page_dtype not in (spec.dtype, torch.float8_e4m3fn):
        reasons.append(f"its kernels read pages of the model's dtype or float8_e4m3fn, not {spec.page_dtype}")
    if spec.page_dtype != spec.dtype and spec.head_dim == NO_FP8_HEAD_DIM:
        reasons.append(
            f"its kernels for FP8 pages are not known to work at head_dim {spec.head_dim}: leave out kv_cache_dtype"
        )
    if spec.head_dim not in HEAD_DIMS:
        reasons.append(f"head_dim is {spec.head_dim}, its kernels take {', '.join(map(str, HEAD_DIMS))}")
    if spec.num_qo_heads % spec.num_kv_heads:
        reasons.append(f"{spec.num_qo_heads} query heads cannot be shared out over {spec.num_kv_heads} KV heads")
    if spec.num_qo_heads * spec.head_dim // 8 > MERGE_THREADS:
        limit = MERGE_THREADS * 8 // spec.head_dim
        reasons.append(f"{spec.num_qo_heads} query heads of {spec.head_dim}: merge_state takes {limit} at most")
    return reasons
