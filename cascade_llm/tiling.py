"""How FlashInfer's FA2 kernel cuts a level of a plan into items of work for a GPU's processors.

Rows times the query heads that share a KV head are packed into *tiles*. For each KV head, each tile of each segment is
an item of work that walks over the segment's K/V. Where a level has fewer tiles than the device takes at a time, the
K/V of long segments are cut into *chunks*, each an item of its own; where it has as many, nothing is cut, and a level
takes at least as long as its longest segment takes on a single processor. So it matters which segments share a level:
to the planner, which prices that, and to CUDA graphs, whose number of segments decides the tile.

Source: PrefillSplitQOKVIndptr and FA2DetermineCtaTileQ in FlashInfer 0.7.2 (attention/scheduler.cuh, utils.cuh).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = [
    "LEAST_CHUNK_TOKENS",
    "NARROW_TILE",
    "WIDE_TILE",
    "chunk_len",
    "graph_items",
    "graph_tile",
    "is_wide",
    "level_tile",
    "max_tiles",
    "narrow_capacity",
    "num_tiles",
    "partial_bytes",
    "segment_tile",
    "tile_for",
    "wide_capacity",
]

WIDE_TILE, NARROW_TILE, LEAF_TILE = 128, 64, 16
"""Packed rows of an item of work. A wide one is bound by arithmetic, the others by memory."""
ITEMS_PER_PROCESSOR = 2
LEAST_CHUNK_TOKENS = 128


def tile_for(packed_rows: float) -> int:
    """The tile that the kernel takes for segments of so many rows x query heads per KV head."""
    if packed_rows > NARROW_TILE:
        return WIDE_TILE
    return NARROW_TILE if packed_rows > LEAF_TILE else LEAF_TILE


def is_wide(rows: int, group_size: int) -> bool:
    """Whether a segment fills more than a narrow tile."""
    return rows * group_size > NARROW_TILE


def segment_tile(rows: int, group_size: int) -> int:
    """The tile that suits a shared segment."""
    return WIDE_TILE if is_wide(rows, group_size) else NARROW_TILE


def level_tile(segment_rows: Sequence[int], num_rows: int, group_size: int, most: int) -> int:
    """The tile that suits a shared level: narrow, unless a segment is wide, or only wide tiles leave K/V to be cut.

    Args:
        segment_rows: of each segment that holds K/V
        num_rows: of the step; what is in none of these segments is taken for one empty segment, which has tiles too
        group_size: query heads per KV head
        most: tiles, see `max_tiles`
    """
    if any(is_wide(rows, group_size) for rows in segment_rows):
        return WIDE_TILE
    parts = [*segment_rows, num_rows - sum(segment_rows)]
    narrow, wide = (sum([num_tiles(rows, group_size, tile) for rows in parts]) for tile in (NARROW_TILE, WIDE_TILE))
    return WIDE_TILE if wide < most <= narrow else NARROW_TILE


def num_tiles(rows: int, group_size: int, tile: int) -> int:
    """Tiles of a segment for each KV head."""
    return -(-rows * group_size // tile)


def max_tiles(num_processors: int, num_kv_heads: int) -> int:
    """Tiles of a level from which on no K/V are cut; with cuts, there are as many items at most."""
    return ITEMS_PER_PROCESSOR * num_processors // num_kv_heads


def chunk_len(tiles: Sequence[int], lens: Sequence[int], most: int, least: int) -> int:
    """The length of a chunk: the shortest with which there are not more than `most` items, if that is possible.

    Args:
        tiles: of each segment, of which there is one at least
        lens: of each segment, in whatever unit
        most: items, see `max_tiles`
        least: no chunk is shorter, in the same unit
    """
    fewest, work = sum(tiles), sum([n * length for n, length in zip(tiles, lens, strict=True)])
    longest = max(1, *lens)
    low, high = max(least, min(longest, -(-work // most))), longest
    if fewest < most:
        high = min(high, -(-work // (most - fewest)))  # each tile has less than one chunk more than its length says
    while low < high:
        middle = (low + high) // 2
        if sum([n * -(-length // middle) for n, length in zip(tiles, lens, strict=True)]) > most:
            low = middle + 1
        else:
            high = middle
    return low


def graph_tile(rows: int, num_segments: int, group_size: int) -> int:
    """The tile in a CUDA graph, which has fixed numbers of rows and segments.

    It suits the largest segment that there can be: the one that is left all rows but one of each other segment.
    """
    return tile_for((rows - num_segments + 1) * group_size)


def graph_items(rows: int, num_segments: int, group_size: int, most: int) -> int:
    """Items that a graph's kernel is launched with for each KV head: enough for any grouping of its rows.

    most: items where K/V are cut, see `max_tiles`
    """
    return max(most, num_tiles(rows, group_size, graph_tile(rows, num_segments, group_size)) + num_segments - 1)


def partial_bytes(num_items: int, tile: int, num_qo_heads: int, group_size: int, head_dim: int) -> int:
    """Memory that a plan with cuts reserves: an output and a log-sum-exp in float32 for each row of each item."""
    return num_qo_heads * -(-num_items * tile // group_size) * (head_dim + 1) * 4


def wide_capacity(rows: int, group_size: int) -> int:
    """Segments of a graph's level that is to have the wide tile: more than it can fill are not needed."""
    return min(rows, max(2, math.ceil(rows * group_size / 32)))


def narrow_capacity(rows: int, group_size: int) -> int:
    """The most segments that still make a narrow tile; where these are too few, as many as there are rows."""
    most = rows - LEAF_TILE // group_size
    return most if most > wide_capacity(rows, group_size) else rows
