"""Dense float64 attention over the gathered K/V of a plan: the definition of right. Slow and plain."""

from __future__ import annotations

import math

import torch

from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import CascadePlan

__all__ = ["reference_attention"]


def reference_attention(
    plan: CascadePlan,
    kv_cache: PagedKVCache,
    layer: int,
    q: torch.Tensor,
    sm_scale: float,
    *,
    soft_cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of every row over all pages that it meets from root to leaf, in one softmax.

    A sequence's rows are its last tokens, so the causal mask is right-aligned, and as a leaf holds at least the new
    tokens, it falls into the leaf alone.

    Args:
        q: [rows, num_qo_heads, head_dim]
        soft_cap: a score s becomes soft_cap * tanh(s / soft_cap)
        sinks: [num_qo_heads], the score of a key that every row reads, with a value of zeros

    Returns:
        out [rows, num_qo_heads, head_dim] and lse [rows, num_qo_heads], base 2, both float64
    """
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float64, device=q.device)
    group_size = q.shape[1] // kv_cache.num_kv_heads
    for sequence in range(plan.leaf.num_segments):
        rows = plan.leaf.rows(sequence)
        k, v = kv_cache.read(layer, _slots(plan, sequence).to(q.device))
        k, v = (x.double().repeat_interleave(group_size, dim=1) for x in (k, v))
        scores = torch.einsum("rhd,khd->rhk", q[rows.start : rows.stop].double(), k) * sm_scale
        if soft_cap is not None:
            scores = soft_cap * (scores / soft_cap).tanh()
        visible = _visible(len(rows), len(k), plan.window_len).to(q.device)
        scores.masked_fill_(~visible[:, None, :], -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.double().view(1, -1, 1).expand(len(rows), -1, 1)), dim=-1)
            v = torch.cat((v, torch.zeros_like(v[:1])))
        out[rows.start : rows.stop] = torch.einsum("rhk,khd->rhd", scores.softmax(-1), v)
        lse[rows.start : rows.stop] = scores.logsumexp(-1) / math.log(2.0)
    return out, lse


def _slots(plan: CascadePlan, sequence: int) -> torch.Tensor:
    """Slots of a sequence's tokens in order: [kv_len]."""
    pages, page_size = plan.page_table(sequence), plan.page_size
    unused = len(plan.leaf.pages(sequence)) * page_size - plan.leaf.kv_len(sequence, page_size)
    slots = torch.tensor(pages).unsqueeze(1) * page_size + torch.arange(page_size)
    return slots.flatten()[: len(pages) * page_size - unused]


def _visible(num_rows: int, kv_len: int, window_len: int | None) -> torch.Tensor:
    """Which keys each of the last `num_rows` tokens may read: [num_rows, kv_len]."""
    positions = torch.arange(kv_len - num_rows, kv_len).unsqueeze(1)
    keys = torch.arange(kv_len)
    visible = keys <= positions
    return visible if window_len is None else visible & (keys > positions - window_len)
