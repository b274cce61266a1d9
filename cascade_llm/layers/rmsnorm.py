"""Root mean square layer normalization (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["RMSNorm"]


class RMSNorm:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, in float32 inside."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.ones(size, dtype=dtype, device=device)
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., size] -> [..., size], x's dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
