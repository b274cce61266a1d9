"""Norms over values that ranks share: each holds as many of them, and the mean square is that of all."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.device.ranks import Ranks
from cascade_llm.layers.fused_ops import FusedOps, RMSNorm

__all__ = ["shared_rms_norms"]


def shared_rms_norms(
    ops: FusedOps, ranks: Ranks, values: Sequence[torch.Tensor], norms: Sequence[RMSNorm]
) -> list[torch.Tensor]:
    """Normalised copies of this rank's values [rows, size], by its part of each norm, in one exchange."""
    if ranks.count == 1:
        return [ops.rms_norm(x.contiguous(), norm) for x, norm in zip(values, norms, strict=True)]
    means = ranks.all_reduce(torch.stack([x.float().square().mean(-1) for x in values])) / ranks.count
    return [
        (x.float() * torch.rsqrt(mean.unsqueeze(1) + norm.eps) * norm.weight.float()).to(x.dtype)
        for x, mean, norm in zip(values, means, norms, strict=True)
    ]
