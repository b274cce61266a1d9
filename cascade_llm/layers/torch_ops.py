"""The elementwise operations in plain torch: on any device, in any dtype; the twin of the faster ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cascade_llm.layers.fused_ops import FusedOps, HeadLayout, RMSNorm
from cascade_llm.layers.rope import Rotation, rotate_heads

__all__ = ["TorchOps"]


class TorchOps(FusedOps):
    """About fifteen small torch operations a layer."""

    name = "torch"

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        """Why nothing faster serves; None where nobody looked."""

    def rms_norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `FusedOps`; x may be [..., size]."""
        return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)

    def add_rms_norm(self, residual: torch.Tensor, delta: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `FusedOps`."""
        return self.rms_norm(residual.add_(delta), norm)

    def rotate(
        self, qkv: torch.Tensor, layout: HeadLayout, rotation: Rotation, norms: tuple[RMSNorm, RMSNorm] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `FusedOps`; q and k are views of a new tensor."""
        q, k, v = layout.split(qkv)
        if norms is None:
            qk = qkv.view(qkv.shape[0], -1, layout.head_dim)[:, : layout.num_rotated]
        else:
            qk = torch.cat((self.rms_norm(q, norms[0]), self.rms_norm(k, norms[1])), dim=1)
        q, k = rotate_heads(qk, rotation).split_with_sizes((layout.num_qo_heads, layout.num_kv_heads), dim=1)
        return q, k, v

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `FusedOps`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
