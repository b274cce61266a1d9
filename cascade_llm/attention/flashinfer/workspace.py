"""The float workspace: where kernels that cut K/V keep the partial results of their chunks.

FlashInfer reserves it when it plans, by shapes alone, so it is sized from the shapes before anything is planned. All
levels of an engine share one, since they run in turn.

Source: PrefillPlanImpl and DecodePlanImpl in FlashInfer 0.7.2 (attention/scheduler.cuh).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.tiling import WIDE_TILE, graph_items, graph_tile, max_tiles, num_tiles, partial_bytes

__all__ = ["float_workspace_bytes", "leaf_splits", "shared_level_splits"]

MAX_LEVEL_BYTES = 256 << 20
"""More than a level may take for being cut: such levels have hundreds of rows in narrow tiles, one query head per KV
head or two, and fill half of the device's processors at least without a cut."""
BLOCKS_PER_PROCESSOR = 16
"""The most blocks of the CUDA-core decode kernel, of 128 threads, that a processor holds at a time."""


def leaf_splits(rows: int, spec: AttentionSpec, num_processors: int) -> bool:
    """Whether a captured leaf of that many rows is planned to cut K/V.

    With more rows FlashInfer never cuts, and a plan without cuts does not depend on lengths.
    """
    return rows < max_tiles(num_processors, spec.num_kv_heads)


def shared_level_splits(rows: int, num_segments: int, spec: AttentionSpec, num_processors: int) -> bool:
    """Whether a captured shared level is planned to cut K/V: where its rows leave processors idle without, and the
    partial results take no more than MAX_LEVEL_BYTES."""
    tile = graph_tile(rows, num_segments, spec.group_size)
    if num_tiles(rows, spec.group_size, tile) >= max_tiles(num_processors, spec.num_kv_heads):
        return False
    return _level_bytes(rows, num_segments, spec, num_processors) <= MAX_LEVEL_BYTES


def float_workspace_bytes(
    spec: AttentionSpec, num_processors: int, shapes: Iterable[tuple[int, Sequence[int]]] = ()
) -> int:
    """What the largest plan of an engine reserves.

    Args:
        spec: the model's attention
        num_processors: of the device
        shapes: rows, and segments of each shared level, of every graph; eager steps of any size are counted too
    """
    most = max_tiles(num_processors, spec.num_kv_heads)
    sizes = [_bytes(most, WIDE_TILE, spec)]  # an eager plan cuts only while all items fit into the device at a time
    if spec.group_size == 1:
        sizes.append(_bytes(BLOCKS_PER_PROCESSOR * num_processors // spec.num_kv_heads, 1, spec))
    for rows, capacities in shapes:
        if leaf_splits(rows, spec, num_processors):
            sizes.append(_level_bytes(rows, rows, spec, num_processors))
        for segments in capacities:
            if shared_level_splits(rows, segments, spec, num_processors):
                sizes.append(_level_bytes(rows, segments, spec, num_processors))
    return max(sizes)


def _level_bytes(rows: int, num_segments: int, spec: AttentionSpec, num_processors: int) -> int:
    items = graph_items(rows, num_segments, spec.group_size, max_tiles(num_processors, spec.num_kv_heads))
    return _bytes(items, graph_tile(rows, num_segments, spec.group_size), spec)


def _bytes(num_items: int, tile: int, spec: AttentionSpec) -> int:
    return partial_bytes(num_items, tile, spec.num_qo_heads, spec.group_size, spec.head_dim)
