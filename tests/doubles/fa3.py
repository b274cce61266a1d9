"""fa3 by FlashInfer's rules: no split of K/V, a tile for every query head, and lengths that are in the plan.

Written from the description of `PrefillSM90Plan` (FlashInfer 0.7.2, scheduler.cuh) and of its kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tests.doubles.device import poison
from tests.doubles.kernels import attend_rows, readable_keys
from tests.doubles.planner import DoubleError

__all__ = ["Fa3Plan", "fa3_plan", "run_fa3"]

FA3_MAGIC, FA3_HEADER, TILE_NUMBERS = 0x0FA30FA3, 4, 5
PLAN_COLUMNS = 7
"""Arrays of a plan with an entry per work; one more says where each processor's begins."""


@dataclass(frozen=True)
class Fa3Plan:
    """The tiles of one head; all heads have the same."""

    tile_rows: int
    max_works: int
    """Over all heads: what a capture has baked in."""
    num_rows: int
    tiles: list[tuple[int, int, int, int, int]]
    """(first row, rows, tile, first entry of the page indices, K/V length) of the segment"""
    num_bytes: int

    @property
    def layout(self) -> tuple[str, int]:
        """What may not change between the plans of one graph."""
        return "fa3", self.max_works

    def numbers(self) -> list[int]:
        """As it lies in the int workspace."""
        header = [FA3_MAGIC, len(self.tiles), self.tile_rows, self.num_rows]
        return [*header, *(number for tile in self.tiles for number in tile)]


def fa3_plan(
    qo_indptr: Sequence[int],
    kv_page_indptr: Sequence[int],
    last_page_len: Sequence[int],
    *,
    max_rows: int,
    num_heads: int,
    head_dim: int,
    page_size: int,
    graph: bool,
    num_sm: int,
) -> Fa3Plan:
    """The planner; lengths are `get_seq_lens`'s, which takes last_page_len for the length where there is no page."""
    tile_rows = 192 if head_dim == 64 else 128
    segments, tiles = len(last_page_len), []
    for i in range(segments):
        rows, pages = qo_indptr[i + 1] - qo_indptr[i], kv_page_indptr[i + 1] - kv_page_indptr[i]
        if rows < 0 or pages < 0:
            raise DoubleError("indptr decreases")
        kv_len = max(pages - 1, 0) * page_size + last_page_len[i]
        tiles += [(qo_indptr[i], rows, tile, kv_page_indptr[i], kv_len) for tile in range(-(-rows // tile_rows))]
    per_head = -(-max_rows // tile_rows) + segments - 1 if graph else len(tiles)
    if len(tiles) > per_head:
        raise DoubleError(f"{len(tiles)} tiles a head for {per_head}")
    works = per_head if per_head > 4096 else per_head * num_heads
    num_bytes = PLAN_COLUMNS * _aligned(4 * works) + _aligned(4 * (num_sm + 1))
    return Fa3Plan(tile_rows, works, qo_indptr[-1], tiles, num_bytes)


def run_fa3(
    workspace: torch.Tensor,
    indices: torch.Tensor,
    q: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    causal: bool,
    scale: float | None,
    window: int,
) -> None:
    """The kernel: rows and lengths are the plan's; of the columns on the device only the page indices are read."""
    poison(out)
    poison(lse)
    numbers = workspace.view(torch.int32)
    magic, num_tiles, tile_rows, num_rows = numbers[:FA3_HEADER].tolist()
    if magic != FA3_MAGIC:
        raise DoubleError("no plan of fa3 in the int workspace")
    if num_rows != len(q):
        raise DoubleError(f"the plan in the int workspace is for {num_rows} rows, not {len(q)}")
    tiles = numbers[FA3_HEADER : FA3_HEADER + TILE_NUMBERS * num_tiles].view(-1, TILE_NUMBERS).tolist()
    for first, count, tile, first_entry, kv_len in tiles:
        rows = range(first + tile * tile_rows, first + min((tile + 1) * tile_rows, count))
        limits = readable_keys(rows, first + count, kv_len, causal=causal, window=window)
        taken = slice(rows.start, rows.stop)
        v, s = attend_rows(q[taken], pools, indices, first_entry, 0, kv_len, scale, limits)
        out[taken], lse[taken] = v.to(out.dtype), s.float()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16
