"""The elementwise work of a decoder layer, behind one door; in torch for any device and dtype, as the others' twin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cascade_llm.layers.rope import Rotation, rotate_heads

__all__ = ["FusedOps", "HeadLayout", "RMSNorm", "TorchOps"]


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """Parameters of a root mean square normalization (Zhang & Sennrich 2019): x / sqrt(mean(x²) + eps) * weight."""

    weight: torch.Tensor
    """[size]"""
    eps: float
    offset: float = 0.0
    """Added to the weight in float32; 1 in Gemma, whose 16-bit weights would lose digits if they held the sum."""

    @classmethod
    def ones(cls, size: int, eps: float, *, dtype: torch.dtype, device: torch.device, offset: float = 0.0) -> RMSNorm:
        """A norm that only scales to unit mean square."""
        return cls(torch.full((size,), 1.0 - offset, dtype=dtype, device=device), eps, offset)


@dataclass(frozen=True)
class HeadLayout:
    """How the product of the fused q, k, v projection is cut into heads: query heads first, then keys, then values."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def num_rotated(self) -> int:
        """Query and key heads."""
        return self.num_qo_heads + self.num_kv_heads

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views q, k and v [rows, heads, head_dim] of qkv [rows, all heads * head_dim]."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        q, k, v = heads.split_with_sizes((self.num_qo_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return q, k, v


class FusedOps(ABC):
    """What happens between the matrix products of a layer. Every implementation computes in float32 inside."""

    name: str

    @abstractmethod
    def rms_norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Normalised copy of x [rows, size]."""

    @abstractmethod
    def add_rms_norm(self, residual: torch.Tensor, delta: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """Add `delta` to `residual` in place, and return the sum normalised; all [rows, size]."""

    @abstractmethod
    def rotate(
        self, qkv: torch.Tensor, layout: HeadLayout, rotation: Rotation | None, norms: tuple[RMSNorm, RMSNorm] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v, each [rows, heads, head_dim], of one projection; q and k rotated.

        Args:
            qkv: [rows, all heads * head_dim], contiguous; may be overwritten
            layout: where the heads lie
            rotation: of the same rows; None rotates nothing
            norms: applied to each query head and each key head before the rotation (Qwen3); of one eps and offset
        """

    @abstractmethod
    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up (SwiGLU, Shazeer 2020), for gate_up [rows, 2 * size], the gate first; -> [rows, size]."""

    @abstractmethod
    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """gelu(gate) * up (GeGLU, Shazeer 2020), gelu by its approximation with tanh (Gemma); shapes as above."""

    @abstractmethod
    def clamped_swiglu(self, gate_up: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
        """gate * sigmoid(alpha * gate) * (up + 1), gate at most `limit`, up within it (gpt-oss); shapes as above."""


class TorchOps(FusedOps):
    """About fifteen small torch operations a layer."""

    name = "torch"

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        """Why nothing faster serves; None where nobody looked."""

    def rms_norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `FusedOps`; x may be [..., size]."""
        if not norm.offset:
            return F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)
        return F.rms_norm(x.float(), norm.weight.shape, norm.offset + norm.weight.float(), norm.eps).to(x.dtype)

    def add_rms_norm(self, residual: torch.Tensor, delta: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `FusedOps`."""
        return self.rms_norm(residual.add_(delta), norm)

    def rotate(
        self, qkv: torch.Tensor, layout: HeadLayout, rotation: Rotation | None, norms: tuple[RMSNorm, RMSNorm] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `FusedOps`; q and k are views of a new tensor, or of `qkv` where nothing is done to them."""
        q, k, v = layout.split(qkv)
        if norms is None:
            qk = qkv.view(qkv.shape[0], -1, layout.head_dim)[:, : layout.num_rotated]
        else:
            qk = torch.cat((self.rms_norm(q, norms[0]), self.rms_norm(k, norms[1])), dim=1)
        turned = qk if rotation is None else rotate_heads(qk, rotation)
        q, k = turned.split_with_sizes((layout.num_qo_heads, layout.num_kv_heads), dim=1)
        return q, k, v

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `FusedOps`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    def gelu_tanh_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `FusedOps`."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh").mul_(up)

    def clamped_swiglu(self, gate_up: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
        """See `FusedOps`."""
        gate, up = gate_up.float().chunk(2, dim=-1)
        gate = gate.clamp(max=limit)
        return (gate * torch.sigmoid(alpha * gate)).mul_(up.clamp(-limit, limit).add_(1)).to(gate_up.dtype)
