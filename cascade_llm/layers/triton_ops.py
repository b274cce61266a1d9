"""Norms of heads and rotary embedding in one launch: an experiment that a benchmark selects.

FlashInfer takes three (two norms, one rotation). In a small model a layer's small kernels outweigh its attention, and
their number is what counts. Not measured on a GPU yet, so no engine chooses it by itself.
"""

from __future__ import annotations

import importlib.util

import torch

from cascade_llm.errors import BackendError
from cascade_llm.layers.flashinfer_layer_ops import FlashInferLayerOps
from cascade_llm.layers.fused_ops import HeadLayout, RMSNorm
from cascade_llm.layers.rope import Rotation

__all__ = ["TritonLayerOps", "norm_rotate_"]


class TritonLayerOps(FlashInferLayerOps):
    """FlashInfer's kernels, but for one of Triton where heads are normalised and rotated: four a layer in all."""

    name = "flashinfer, triton"

    def rotate(
        self, qkv: torch.Tensor, layout: HeadLayout, rotation: Rotation, norms: tuple[RMSNorm, RMSNorm] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `FusedOps`; q and k are views of `qkv`."""
        norm_rotate_(qkv, layout, rotation.cos_sin, norms)
        return layout.split(qkv)


def norm_rotate_(
    qkv: torch.Tensor, layout: HeadLayout, cos_sin: torch.Tensor, norms: tuple[RMSNorm, RMSNorm] | None
) -> None:
    """Normalise and rotate query and key heads in place, in float32 inside.

    Args:
        qkv: [rows, all heads * head_dim], its last dimension contiguous
        layout: where the heads lie; head_dim a power of two
        cos_sin: [rows, head_dim], float32, contiguous: cos, then sin
        norms: of query and of key heads, with one eps; None leaves them as they are

    Raises:
        BackendError: without Triton
    """
    if importlib.util.find_spec("triton") is None:
        raise BackendError("Triton is not installed: it comes with torch's CUDA builds, or with pip install triton")
    from cascade_llm.layers.triton_kernels import norm_rotate_kernel

    q_norm, k_norm = norms or (None, None)
    assert q_norm is None or k_norm is None or q_norm.eps == k_norm.eps
    assert qkv.stride(-1) == 1
    assert cos_sin.is_contiguous()
    norm_rotate_kernel[len(qkv), layout.num_rotated](
        qkv,
        cos_sin,
        qkv if q_norm is None else q_norm.weight,
        qkv if k_norm is None else k_norm.weight,
        0.0 if q_norm is None else q_norm.eps,
        qkv.stride(0),
        NUM_QO_HEADS=layout.num_qo_heads,
        HEAD_DIM=layout.head_dim,
        HAS_NORMS=norms is not None,
        num_warps=1,
    )
