"""Which CUDA graphs there are, and which of them serves a step.

A graph is captured for a number of rows and, for each shared level, a number of segments. Both are capacities: a step
takes the smallest graph that holds it, and the rest is padding. The number of segments also decides which tile the
kernel computes in (`tiling`): few segments mean *wide* tiles, which suit a segment of many rows; many segments mean
*narrow* ones, which waste less on small ones. So a level's shape is chosen by its largest segment, as the cost model
assumes it (`tiling.level_tile`), where its number of segments allows it. Levels that follow each other refine, so a
wide level is never below a narrow one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cascade_llm.plan import CascadeLevel, CascadePlan
from cascade_llm.tiling import WIDE_TILE, graph_tile, level_tile, narrow_capacity, wide_capacity

__all__ = ["GraphShape", "fitting_shape", "graph_shapes", "row_buckets"]

ROW_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
FIRST_SHARED_ROWS = 8
"""Fewer rows have no graphs with shared levels of their own."""


class GraphShape(NamedTuple):
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
        wide, narrow = wide_capacity(rows, group_size), narrow_capacity(rows, group_size)
        for levels in range(max_shared_levels, 0, -1):
            if rows >= FIRST_SHARED_ROWS or rows == max_rows > 1:
                for num_wide in range(levels + 1):
                    shapes[GraphShape(rows, (wide,) * num_wide + (narrow,) * (levels - num_wide))] = None
        shapes[GraphShape(rows, ())] = None
    return list(shapes)


def fitting_shape(
    plan: CascadePlan,
    shapes: Sequence[GraphShape],
    group_size: int,
    most_tiles: int = 0,
    others: Sequence[CascadePlan] = (),
) -> GraphShape | None:
    """The smallest of the shapes that holds a decode plan; among shapes of equal rows the one with the best tiles.

    Args:
        plan: of the first attention kind
        shapes: that were captured
        group_size: query heads per KV head
        most_tiles: see `tiling.max_tiles`; 0 where no K/V are cut
        others: of further kinds; one with fewer levels leaves the graph's last ones empty
    """
    plans = (plan, *others)
    depth = max(len(each.shared_levels) for each in plans)
    wanted = [
        (position, level_tile(_segment_rows(level), plan.num_rows, group_size, most_tiles))
        for each in plans
        for position, level in enumerate(each.shared_levels)
    ]
    best: tuple[tuple[int, int, int], GraphShape] | None = None
    for shape in shapes:
        if shape.rows < plan.num_rows or len(shape.capacities) != depth:
            continue
        if any(
            needed > have
            for each in plans
            for needed, have in zip(_segments_needed(each, shape.rows), shape.capacities, strict=False)
        ):
            continue
        wrong_tiles = sum(
            (tile == WIDE_TILE) != (graph_tile(shape.rows, shape.capacities[position], group_size) == WIDE_TILE)
            for position, tile in wanted
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


def _segment_rows(level: CascadeLevel) -> list[int]:
    """Rows of the segments that hold pages."""
    pages, rows = level.kv_page_indptr, level.qo_indptr
    return [rows[i + 1] - rows[i] for i in range(level.num_segments) if pages[i] < pages[i + 1]]
