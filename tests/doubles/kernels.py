"""What FlashInfer's kernels compute, tile by tile, in float64 where they accumulate."""

from __future__ import annotations

import math

import torch

from tests.doubles.device import poison
from tests.doubles.planner import HEADER, MAGIC, DoubleError

__all__ = [
    "assign",
    "attend_rows",
    "merge_states_in_place",
    "normalized",
    "readable_keys",
    "run_tiles",
]


def run_tiles(
    workspace: torch.Tensor,
    buffers: tuple[torch.Tensor | None, ...],
    q: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: int,
    soft_cap: float | None,
    no_surplus: bool = False,
) -> None:
    """The kernel: every tile of the plan in the workspace, over what the device's columns say now."""
    poison(out)
    poison(lse)
    numbers = workspace.view(torch.int32)
    magic, num_tiles, _, tile_q, chunk_pages, split, _, num_rows = numbers[:HEADER].tolist()
    if magic != MAGIC:
        raise DoubleError("no plan in the int workspace")
    if num_rows != len(q):
        raise DoubleError(f"the plan in the int workspace is for {num_rows} rows, not {len(q)}")
    tiles = numbers[HEADER : HEADER + 3 * num_tiles].view(-1, 3).tolist()
    qo_indptr, kv_indptr, _, last_page_len = (b.tolist() if b is not None else [] for b in buffers)
    group, page_size = q.shape[1] // pools[0].shape[2], pools[0].shape[1]
    states: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    for segment, q_tile, kv_tile in tiles:
        first, end = qo_indptr[segment], qo_indptr[segment + 1]
        pages = kv_indptr[segment + 1] - kv_indptr[segment]
        kv_len = (pages - 1) * page_size + last_page_len[segment] if pages else 0
        begin = kv_tile * chunk_pages * page_size if split else 0
        if no_surplus and begin > kv_len:
            raise DoubleError("CUDA-core decode underflows where a chunk starts behind the end")
        stop = max(begin, min(kv_len, begin + chunk_pages * page_size)) if split else kv_len
        packed = range(q_tile * tile_q, min((q_tile + 1) * tile_q, (end - first) * group))
        if not packed:
            continue
        rows = range(first + packed.start // group, first + -(-packed.stop // group))
        limits = readable_keys(rows, end, kv_len, causal=causal, window=window)
        v, s = attend_rows(
            q[rows.start : rows.stop], pools, buffers[2], kv_indptr[segment], begin, stop, scale, limits, soft_cap
        )
        if split:  # partial results pass through memory in the output's dtype
            v = v.to(q.dtype).double()
        if (segment, q_tile) in states:
            v, s = joined_states(*states[segment, q_tile], v, s)
        states[segment, q_tile] = v, s
        for head in range(group):  # of each group: the tile may begin or end inside a row
            begin_row, end_row = (-((head - packed_row) // group) for packed_row in (packed.start, packed.stop))
            to = slice(first + begin_row, first + end_row), slice(head, None, group)
            own = slice(to[0].start - rows.start, to[0].stop - rows.start), to[1]
            out[to], lse[to] = v[own].to(out.dtype), s[own].float()


def readable_keys(rows: range, end: int, kv_len: int, *, causal: bool, window: int) -> list[tuple[int, int]]:
    """The keys that each row may read; the mask is aligned to the right."""
    limits = []
    for row in rows:
        stop = kv_len - (end - 1 - row) if causal else kv_len
        limits.append((max(0, stop - 1 - window) if window >= 0 else 0, stop))
    return limits


def attend_rows(
    q: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    indices: torch.Tensor | None,
    first_entry: int,
    begin: int,
    stop: int,
    scale: float | None,
    limits: list[tuple[int, int]],
    soft_cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(v, s) of rows over tokens begin:stop of one segment, float64, s base 2; (0, -inf) where there are none."""
    assert indices is not None
    rows, heads, head_dim = q.shape
    page_size, num_kv_heads = pools[0].shape[1:3]
    if begin == stop:
        empty = torch.full((rows, heads), -torch.inf, dtype=torch.float64)
        return q.new_zeros(q.shape, dtype=torch.float64), empty
    token = torch.arange(begin, stop)
    pages = indices[first_entry + token // page_size].long()
    k, v = (_gathered(pool, pages, token % page_size).transpose(0, 1) for pool in pools)
    by_kv_head = q.double().reshape(rows, num_kv_heads, -1, head_dim).transpose(0, 1)
    scores = by_kv_head.flatten(1, 2) @ k.mT * (scale or head_dim**-0.5)
    if soft_cap is not None:
        scores = soft_cap * (scores / soft_cap).tanh()
    if any(lower > begin or upper < stop for lower, upper in limits):
        lower, upper = torch.tensor(limits).repeat_interleave(heads // num_kv_heads, dim=0).unsqueeze(-1).unbind(1)
        scores.masked_fill_((token < lower) | (token >= upper), -torch.inf)
    s = scores.logsumexp(-1)
    weights = torch.exp(scores - s.masked_fill(s == -torch.inf, 0.0).unsqueeze(-1))
    out = (weights @ v).view(by_kv_head.shape).transpose(0, 1).reshape(q.shape)
    return out, s.view(num_kv_heads, rows, -1).transpose(0, 1).reshape(rows, heads) / math.log(2.0)


def _gathered(pool: torch.Tensor, pages: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    if pool.dtype == torch.float8_e4m3fn:  # torch gathers no 8-bit floats on the CPU
        return pool.view(torch.uint8)[pages, offsets].view(pool.dtype).double()
    return pool[pages, offsets].double()


def joined_states(
    v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    largest = torch.maximum(s, s_other)
    anchor = largest.masked_fill(largest == -torch.inf, 0.0)
    a, b = torch.exp2(s - anchor), torch.exp2(s_other - anchor)
    total = a + b
    share = torch.where(total > 0, total, 1.0).unsqueeze(-1)
    return (v * a.unsqueeze(-1) + v_other * b.unsqueeze(-1)) / share, torch.log2(total) + anchor


def merge_states_in_place(v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor) -> None:
    merged, total = joined_states(v.double(), s.double(), v_other.double(), s_other.double())
    v.copy_(merged)
    s.copy_(total)


def normalized(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    exact = x.float()
    return exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps) * weight.float()


def assign(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
