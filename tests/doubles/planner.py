"""FlashInfer's planning arithmetic for FA2 prefill and CUDA-core decode, in Python: tiles, splits, padding.

Written from the description of `PrefillSplitQOKVIndptr` and `DecodePlan` (FlashInfer 0.7.2, scheduler.cuh), apart from
anything in the package, so that the package's own arithmetic is checked and not repeated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["HEADER", "MAGIC", "DoubleError", "KernelPlan", "decode_plan", "prefill_plan"]

MAGIC, HEADER = 0x0CA5CADE, 8
"""How a plan in an int workspace begins: this number, and so many in all before its tiles."""
WHOLE = 1 << 30
"""Chunk length, in pages, where K/V are not split."""


class DoubleError(Exception):
    """The engine broke a rule of the device or of FlashInfer."""


@dataclass(frozen=True)
class KernelPlan:
    """What a kernel is launched with: the tiles, and a layout that a captured graph has baked in."""

    split_kv: bool
    cta_tile_q: int
    padded_tiles: int
    chunk_pages: int
    tiles: list[tuple[int, int, int]]
    """(segment, q tile, kv chunk)"""

    @property
    def layout(self) -> tuple[bool, int, int]:
        """What may not change between the plans of one graph."""
        return self.split_kv, self.cta_tile_q, self.padded_tiles


def cta_tile_q(packed_len: int, head_dim: int) -> int:
    """Rows x query heads per KV head that one thread block takes."""
    if packed_len > 64 and head_dim < 256:
        return 128
    return 64 if packed_len > 16 else 16


def prefill_plan(
    qo_indptr: Sequence[int],
    kv_page_indptr: Sequence[int],
    *,
    max_rows: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    graph: bool,
    disable_split_kv: bool,
    num_sm: int,
) -> KernelPlan:
    """The FA2 planner."""
    group, segments = num_qo_heads // num_kv_heads, len(qo_indptr) - 1
    packed = [(qo_indptr[i + 1] - qo_indptr[i]) * group for i in range(segments)]
    pages = [kv_page_indptr[i + 1] - kv_page_indptr[i] for i in range(segments)]
    if min(packed, default=0) < 0 or min(pages, default=0) < 0:
        raise DoubleError("indptr decreases")
    cap = 2 * num_sm // num_kv_heads
    if graph:
        # uint32: fewer rows than segments less one wraps round and picks the largest tile
        tile = cta_tile_q(((max_rows - segments + 1) % (1 << 32)) * group, head_dim)
        bound = _ceil(max_rows * group, tile) + segments - 1
    else:
        tile, bound = cta_tile_q(sum(packed) // segments, head_dim), 0
    split, chunk = (False, WHOLE) if disable_split_kv else _split(packed, pages, tile, cap, page_size, graph)
    tiles = [
        (i, q_tile, kv_tile)
        for i in range(segments)
        for q_tile in range(_ceil(packed[i], tile))
        for kv_tile in range(1 if disable_split_kv else _ceil(max(pages[i], 1), chunk))
    ]
    padded = max(cap, bound) if graph else len(tiles)
    if len(tiles) > padded:
        raise DoubleError(f"{len(tiles)} tiles for a grid of {padded}")
    return KernelPlan(split, tile, padded, chunk, tiles)


def decode_plan(
    kv_page_indptr: Sequence[int], *, num_kv_heads: int, page_size: int, graph: bool, num_sm: int
) -> KernelPlan:
    """The planner of the CUDA-core decode kernel; it counts a segment without pages wrongly, so none may be there."""
    pages = [b - a for a, b in pairwise(kv_page_indptr)]
    if min(pages) < 1:
        raise DoubleError("CUDA-core decode drops tiles where a segment has no pages")
    max_grid = 2 * num_sm
    if len(pages) * num_kv_heads >= max_grid:
        split, chunk, padded = False, max(pages), len(pages)
    else:
        low, high = max(128 // page_size, 1), max(pages)
        while low < high:
            middle = (low + high) // 2
            if sum(_ceil(n, middle) for n in pages) * num_kv_heads > max_grid:
                low = middle + 1
            else:
                high = middle
        chunk = low
        num_tiles = sum(_ceil(n, chunk) for n in pages)
        split = graph or num_tiles != len(pages)
        padded = max_grid // num_kv_heads if graph else num_tiles
    tiles = [(i, 0, kv_tile) for i, n in enumerate(pages) for kv_tile in range(_ceil(n, chunk))]
    if len(tiles) > padded:
        raise DoubleError(f"{len(tiles)} tiles for a grid of {padded}: those beyond are dropped")
    return KernelPlan(split, 16, padded, chunk, tiles)


def _split(packed: list[int], pages: list[int], tile: int, cap: int, page_size: int, graph: bool) -> tuple[bool, int]:
    longest = max(1, *pages)
    low, high = max(128 // page_size, 1), longest
    while low < high:
        middle = (low + high) // 2
        tiles = sum(_ceil(p, tile) * _ceil(max(n, 1), middle) for p, n in zip(packed, pages, strict=True))
        if tiles > cap:
            low = middle + 1
        else:
            high = middle
    return graph or low < longest, low


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
