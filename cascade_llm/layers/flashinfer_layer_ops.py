"""The elementwise operations by FlashInfer's kernels, for CUDA."""

from __future__ import annotations

import torch

from cascade_llm.attention.flashinfer.ops import FlashInferOps
from cascade_llm.layers.fused_ops import FusedOps, HeadLayout, RMSNorm, TorchOps
from cascade_llm.layers.rope import Rotation

__all__ = ["FlashInferLayerOps"]


class FlashInferLayerOps(FusedOps):
    """Four kernels a layer, six with norms of the heads. Captured graphs may hold them: no call reads the host.

    GeGLU and the clamped SwiGLU are torch's kernels, some small ones each.
    """

    name = "flashinfer"

    def __init__(self, ops: FlashInferOps, device: torch.device, max_rows: int) -> None:
        """`max_rows`: rows of the largest step."""
        self._ops, self._torch = ops, TorchOps()
        self._row_numbers = torch.arange(max_rows, dtype=torch.int32, device=device)

    def rms_norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `FusedOps`; x may be [rows, heads, size], which a norm with an offset copies."""
        y: torch.Tensor
        if not norm.offset:
            y = self._ops.rmsnorm(x, norm.weight, norm.eps)
        else:
            assert norm.offset == 1
            y = self._ops.gemma_rmsnorm(x.reshape(-1, x.shape[-1]), norm.weight, norm.eps).view(x.shape)
        return y

    def add_rms_norm(self, residual: torch.Tensor, delta: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `FusedOps`; `delta` is overwritten and returned."""
        assert norm.offset in (0, 1)
        fused = self._ops.gemma_fused_add_rmsnorm if norm.offset else self._ops.fused_add_rmsnorm
        fused(delta, residual, norm.weight, norm.eps)
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

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `FusedOps`."""
        return self._torch.gelu_tanh_and_mul(gate_up)

    def clamped_swiglu(self, gate_up: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
        """See `FusedOps`."""
        return self._torch.clamped_swiglu(gate_up, limit, alpha)
