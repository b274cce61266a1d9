"""Which CUDA graphs there are, and which of them serves a step.

A graph is captured for a number of rows and, for each shared level, a number of segments. Both are capacities: a step
takes the smallest graph that holds it, and the rest is padding. The number of segments also decides which tile the
kernel computes in, since FlashInfer sizes it for (rows - segments + 1) rows in one segment: few segments mean tiles of
128 rows x heads (*wide*), which suit a segment of many rows; many segments mean tiles of 64 (*narrow*), which waste
less on small ones. So a level's shape is chosen by its largest segment, where its number of segments allows it. Levels
that follow each other refine, so a wide level is never below a narrow one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cascade_llm.plan import CascadeLevel, CascadePlan

__all__ = ["GraphShape", "fitting_shape", "graph_shapes", "row_buckets"]

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
FIRST_SHARED_ROWS = 8
"""Fewer rows have no graphs with shared levels of their own."""
WIDE_TILE, NARROW_TILE = 64, 16
"""More rows x query heads per KV head than this make FlashInfer's tile 128, and 64; up to 16 it is 16."""


@dataclass(frozen=True)
class GraphShape:
    """The capacities of one graph."""

    rows: int
    capacities: tuple[int, ...]
    """Segments of each shared level, coarsest first."""

    def __str__(self) -> str:
        return f"{self.rows} rows" + "".join(f" x {capacity}" for capacity in self.capacities)


def row_buckets(max_rows: int) -> tuple[int, ...]:
    """The row capacities up to `max_rows`, which is the last."""
    buckets = [rows for rows in ROW_BUCKETS if rows < max_rows]
    while buckets and max_rows - buckets[-1] > 128:
        buckets.append(buckets[-1] + 128)
    return (*buckets, max_rows)


def graph_shapes(max_rows: int, group_size: int, max_shared_levels: int) -> list[GraphShape]:
    """All graphs, the largest first, so that later captures find room in the memory pool of earlier ones.

    Args:
        max_rows: sequences of the largest step
        group_size: query heads per KV head
        max_shared_levels: levels above the leaf that a plan may have
    """
    shapes: dict[GraphShape, None] = {}
    for rows in reversed(row_buckets(max_rows)):
        wide, narrow = _wide_capacity(rows, group_size), _narrow_capacity(rows, group_size)
        for levels in range(max_shared_levels, 0, -1):
            if rows >= FIRST_SHARED_ROWS or rows == max_rows > 1:
                for num_wide in range(levels + 1):
                    shapes[GraphShape(rows, (wide,) * num_wide + (narrow,) * (levels - num_wide))] = None
        shapes[GraphShape(rows, ())] = None
    return list(shapes)


def fitting_shape(plan: CascadePlan, shapes: Sequence[GraphShape], group_size: int) -> GraphShape | None:
    """The smallest of the shapes that holds a decode plan; among shapes of equal rows the one with the best tiles."""
    largest = [_largest_segment(level) * group_size for level in plan.shared_levels]
    best: tuple[tuple[int, int, int], GraphShape] | None = None
    for shape in shapes:
        if shape.rows < plan.num_rows or len(shape.capacities) != len(largest):
            continue
        if any(
            needed > have for needed, have in zip(_segments_needed(plan, shape.rows), shape.capacities, strict=True)
        ):
            continue
        wrong_tiles = sum(
            (rows > WIDE_TILE) != (_tile_rows(shape.rows, capacity, group_size) > WIDE_TILE)
            for rows, capacity in zip(largest, shape.capacities, strict=True)
        )
        rank = (shape.rows, wrong_tiles, sum(shape.capacities))
        if best is None or rank < best[0]:
            best = rank, shape
    return best[1] if best else None


def needs_padding_segment(level: CascadeLevel, num_rows: int, capacity_rows: int) -> bool:
    """Whether padding rows need an empty segment of their own behind the level's last, which holds pages."""
    return num_rows < capacity_rows and level.kv_page_indptr[-1] != level.kv_page_indptr[level.num_segments - 1]


def _segments_needed(plan: CascadePlan, rows: int) -> Iterator[int]:
    for level in plan.shared_levels:
        yield level.num_segments + needs_padding_segment(level, plan.num_rows, rows)


def _largest_segment(level: CascadeLevel) -> int:
    """Rows of the largest segment that holds pages."""
    pages, rows = level.kv_page_indptr, level.qo_indptr
    return max((rows[i + 1] - rows[i] for i in range(level.num_segments) if pages[i] < pages[i + 1]), default=0)


def _tile_rows(rows: int, capacity: int, group_size: int) -> int:
    """Rows x heads that FlashInfer sizes the tile for."""
    return (rows - capacity + 1) * group_size


def _wide_capacity(rows: int, group_size: int) -> int:
    return min(rows, max(2, math.ceil(rows * group_size / 32)))


def _narrow_capacity(rows: int, group_size: int) -> int:
    """The most segments that still make a tile of 64; where these are too few, as many as there are rows."""
    most = rows - NARROW_TILE // group_size
    return most if most > _wide_capacity(rows, group_size) else rows
