"""What FlashInfer calls its kernel modules, derived without importing it: an import asks for the GPU."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["module_purposes"]

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float8_e4m3fn: "e4m3"}
COMMON = {
    "cascade": "merging levels",
    "page": "appending to pages",
    "rope": "rotary embedding",
    "norm": "norms",
    "silu_and_mul": "gated activation",
    "sampling": "filters of sampling",
}
"""Modules that every model needs, whatever its shape."""


def module_purposes(dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int, kernels: Iterable[str]) -> dict[str, str]:
    """The modules that an engine loads, by name, and what each is for.

    Args:
        dtype, kv_dtype: of the model and of its pages: keys of `DTYPE_NAMES`
        head_dim: of its heads
        kernels: names from a `KernelTable`

    Source: the `get_*_uri` functions of FlashInfer 0.7.2, no position encoding, no sliding window, no soft cap.
    """
    types = f"dtype_q_{DTYPE_NAMES[dtype]}_dtype_kv_{DTYPE_NAMES[kv_dtype]}_dtype_o_{DTYPE_NAMES[dtype]}_dtype_idx_i32"
    heads = f"{types}_head_dim_qk_{head_dim}_head_dim_vo_{head_dim}_posenc_0"
    shape = f"{heads}_use_swa_False_use_logits_cap_False"
    fa2 = f"batch_prefill_with_kv_cache_{shape}_f16qk_False_kv_stride_equal"
    fa3 = f"batch_prefill_with_kv_cache_{shape}_f16qk_False_sm90"
    fused = f"batch_attention_with_kv_cache_{heads}_use_logits_soft_cap_false_use_profiler_false_kv_stride_equal"
    attention = {
        "prefill_fa2": fa2,
        "decode_tensor_cores": fa2,
        "prefill_fa3": fa3,
        "prefill_fa3_chunks": fa3,
        "decode_cuda_cores": f"batch_decode_with_kv_cache_{shape}",
        "fused_levels": fused,
    }
    purposes: dict[str, list[str]] = {}
    for kernel in sorted(set(kernels)):
        purposes.setdefault(attention[kernel], []).append(kernel)
    return {**{name: ", ".join(served) for name, served in purposes.items()}, **COMMON}
