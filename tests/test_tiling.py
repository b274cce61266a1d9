"""The kernel's arithmetic as the planner uses it, against the planner of the strict double, written on its own."""

from __future__ import annotations

import random
from itertools import accumulate

import pytest

from cascade_llm import tiling
from tests.doubles.planner import cta_tile_q, prefill_plan

PAGE_SIZE = 16


def test_tiles_are_the_kernel_s() -> None:
    for packed in range(1, 200):
        assert tiling.tile_for(packed) == cta_tile_q(packed, 128)


@pytest.mark.parametrize("num_kv_heads", [1, 8, 16])
def test_chunks_are_the_kernel_s(num_kv_heads: int) -> None:
    rng = random.Random(num_kv_heads)
    num_cut = 0
    for _ in range(400):
        group_size, num_sm = rng.choice((1, 2, 4, 8)), rng.choice((16, 108, 132))
        segment_rows = [rng.choice((1, 2, 5, 40, 300)) for _ in range(rng.choice((1, 2, 4, 12, 40)))]
        pages = [rng.choice((1, 3, 40, 700, 4000)) for _ in segment_rows]
        theirs = prefill_plan(
            list(accumulate(segment_rows, initial=0)),
            list(accumulate(pages, initial=0)),
            max_rows=sum(segment_rows),
            num_qo_heads=num_kv_heads * group_size,
            num_kv_heads=num_kv_heads,
            head_dim=128,
            page_size=PAGE_SIZE,
            graph=True,
            disable_split_kv=False,
            num_sm=num_sm,
        )
        tile = tiling.graph_tile(sum(segment_rows), len(segment_rows), group_size)
        assert tile == theirs.cta_tile_q
        tiles = [tiling.num_tiles(rows, group_size, tile) for rows in segment_rows]
        most = tiling.max_tiles(num_sm, num_kv_heads)
        ours = tiling.chunk_len(tiles, pages, most, tiling.LEAST_CHUNK_TOKENS // PAGE_SIZE)
        assert ours == theirs.chunk_pages
        num_items = sum(n * -(-length // ours) for n, length in zip(tiles, pages, strict=True))
        assert num_items == len(theirs.tiles)
        num_cut += ours < max(pages)
        if sum(tiles) >= most:
            assert ours >= max(pages), "nothing is cut"
    assert 50 < num_cut < 350


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_a_level_is_narrow_unless_a_segment_is_wide_or_only_wide_tiles_can_be_cut(group_size: int) -> None:
    few = [64 // group_size] * 3
    assert tiling.level_tile(few, sum(few), group_size, 33) == tiling.NARROW_TILE
    assert tiling.level_tile([*few, 64 // group_size + 1], 4 * few[0] + 1, group_size, 33) == tiling.WIDE_TILE
    num_rows = 1 + 32 * 64 // group_size  # one segment of one row; the others fill 32 narrow tiles, or 16 wide ones
    assert tiling.level_tile([1], num_rows, group_size, 33) == tiling.WIDE_TILE
    assert tiling.level_tile([1], num_rows, group_size, 34) == tiling.NARROW_TILE
    assert tiling.level_tile([1], num_rows, group_size, 17) == tiling.NARROW_TILE, "cut by neither"
