"""Attention over dense K and V: two matrix products around a softmax, with the log-sum-exp that merging needs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["Workspace", "dense_attention"]

LOG2_E = math.log2(math.e)


class Workspace:
    """Buffers that live from call to call, because fresh large ones cost more in page faults than the mathematics."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor [*shape]; it is overwritten by the next `take` of the same name and dtype."""
        size = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=dtype, device=self._device)
            self._buffers[name, dtype] = buffer
        return buffer[:size].view(shape)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    bias: torch.Tensor | None,
    workspace: Workspace,
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * sm_scale + bias) v, the softmax in float32; with a cap, of capped scores.

    Args:
        q: [batch, queries, head_dim]
        k, v: [batch, kv_len, head_dim], q's dtype, kv_len at least 1
        bias: float32, added to the last `bias.shape[-1]` scores of every query; broadcast against them as
            [outer, inner, rows, group, columns] where outer * inner = batch and rows * group = queries. No query may
            lose all its keys.
        soft_cap: a score s becomes soft_cap * tanh(s / soft_cap) before the bias

    Returns:
        out [batch, queries, head_dim], q's dtype; lse [batch, queries], float32, base 2
    """
    batch, num_queries, _ = q.shape
    shape = (batch, num_queries, k.shape[1])
    scores = workspace.take("scores", shape, q.dtype)
    torch.baddbmm(scores, q, k.transpose(1, 2), beta=0, alpha=sm_scale, out=scores)
    weights = scores if q.dtype == torch.float32 else workspace.take("weights", shape, torch.float32).copy_(scores)
    if soft_cap is not None:
        weights.div_(soft_cap).tanh_().mul_(soft_cap)
    if bias is not None:
        outer, _, rows, _, columns = bias.shape
        weights.view(outer, batch // outer, rows, num_queries // rows, -1)[..., -columns:].add_(bias)
    top_score = weights.amax(-1)
    torch.softmax(weights, -1, out=weights)
    # The largest weight is 2 ** (top_score - lse): a float32 log-sum-exp without another pass of exponentials.
    lse = torch.sub(top_score * LOG2_E, weights.amax(-1).log2_())
    if weights is not scores:
        scores.copy_(weights)
    return torch.bmm(scores, v), lse
