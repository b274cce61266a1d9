"""The elementwise operations by FlashInfer's kernels, for CUDA."""

from __future__ import annotations

import torch

from cascade_llm.attention.flashinfer.ops import FlashInferOps
from cascade_llm.layers.fused_ops import FusedOps, HeadLayout, RMSNorm
from cascade_llm.layers.rope import Rotation

__all__ = ["FlashInferLayerOps"]


class FlashInferLayerOps(FusedOps):
    """Four kernels a layer, six with norms of the heads. Captured graphs may hold them: no call reads the host."""

    name = "flashinfer"

    def __init__(self, ops: FlashInferOps, device: torch.device, max_rows: int) -> None:
        """`max_rows`: rows of the largest step."""
        self._ops = ops
        self._row_numbers = torch.arange(max_rows, dtype=torch.int32, device=device)

    def rms_norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `FusedOps`."""
        y: torch.Tensor = self._ops.rmsnorm(x, norm.weight, norm.eps)
        return y

    def add_rms_norm(self, residual: torch.Tensor, delta: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `FusedOps`; `delta` is overwritten and returned."""
        self._ops.fused_add_rmsnorm(delta, residual, norm.weight, norm.eps)
        return delta

    def rotate(
        self, qkv: torch.Tensor, layout: HeadLayout, rotation: Rotation | None, norms: tuple[RMSNorm, RMSNorm] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `FusedOps`; without norms q and k are views of `qkv`, rotated where they lie."""
        q, k, v = layout.split(qkv)
        if norms is not None:
            q, k = self.rms_norm(q, norms[0]), self.rms_norm(k, norms[1])
        if rotation is None:
            return q, k, v
        rows = len(qkv)
        # the step's rows of the table were looked up once: row i of them is position i of this smaller table
        self._ops.apply_rope_with_cos_sin_cache_inplace(
            self._row_numbers[:rows],
            q.flatten(1),
            k.flatten(1),
            layout.head_dim,
            rotation.cos_sin,
            is_neox=not rotation.is_interleaved,
        )
        return q, k, v

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `FusedOps`."""
        product: torch.Tensor = self._ops.silu_and_mul(gate_up)
        return product
