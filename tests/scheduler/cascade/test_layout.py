"""A choice of segments becomes an order of rows and levels."""

from __future__ import annotations

import random
from array import array

import pytest

from cascade_llm.scheduler.cascade.balance import levels_by_depth
from cascade_llm.scheduler.cascade.choice import SegmentChoice
from cascade_llm.scheduler.cascade.layout import Segment, level_columns, place_segments
from cascade_llm.scheduler.cascade.tree import Run
from tests.scheduler.forests import all_runs, paths_to_sequences, random_forest


def random_choice(rng: random.Random, top: Run, max_levels: int) -> SegmentChoice:
    """Any choice of runs, good or bad."""
    start_pages: dict[Run, int] = {}
    deepest = 0
    wanted = {run for run in all_runs(top) if rng.random() < 0.5}
    for path in paths_to_sequences(top).values():
        start = depth = 0
        for run in path:
            if run in wanted and depth < max_levels:
                start_pages[run] = start
                start, depth = run.end, depth + 1
        deepest = max(deepest, depth)
    return SegmentChoice(start_pages, deepest)


def test_every_sequence_meets_the_chosen_runs_of_its_path() -> None:
    rng = random.Random(0)
    for _ in range(300):
        top, num_new = random_forest(rng, 9)
        choice = random_choice(rng, top, 3)
        order, levels, prefix_pages = place_segments(top, choice, num_new, levels_by_depth(top, choice))
        assert sorted(order) == list(range(len(num_new)))
        first_row, row = {}, 0
        for index in order:
            first_row[index] = row
            row += num_new[index]
        for index, path in paths_to_sequences(top).items():
            chosen = [run for run in path if run in choice.start_pages]
            assert prefix_pages[index] == (chosen[-1].end if chosen else 0)
            met = [s for segments in levels for s in segments if s.first_row <= first_row[index] < s.last_row]
            assert [(s.start_page, s.end_page) for s in met] == [(choice.start_pages[r], r.end) for r in chosen]
            assert [s.num_sequences for s in met] == [r.num_sequences for r in chosen]
            assert [s.last_row - s.first_row for s in met] == [r.num_rows for r in chosen]
            for segment, run in zip(met, chosen, strict=True):
                assert run in paths_to_sequences(top)[segment.sequence]


def test_rows_with_nothing_more_to_share_come_last_together() -> None:
    first, second, folded, outer = Run(3, 5), Run(2, 4), Run(2, 3), Run(0, 2)
    first.members, second.members, folded.members, outer.members = [5, 1], [0, 3], [2], [4]
    folded.children, outer.children = [first], [folded, second]
    top = Run(0, 0)
    top.members, top.children = [6], [outer]
    placement = place_segments(
        top, SegmentChoice({outer: 0, first: 2, second: 2}, 2), [1] * 7, {outer: 0, first: 1, second: 1}
    )
    assert placement.order == [1, 5, 0, 3, 2, 4, 6], "2 shares the folded run with 1 and 5, and reads it alone"
    assert placement.levels == [
        [Segment(0, 6, 0, 2, 1, 6)],
        [Segment(0, 2, 2, 5, 1, 2), Segment(2, 4, 2, 4, 0, 2)],
    ]
    assert placement.prefix_pages == [4, 5, 2, 4, 2, 5, 0]


def test_columns_have_empty_segments_where_nothing_is_shared_and_keep_the_boundaries_above() -> None:
    tables = [array("i", [10, 11, 12]), array("i", [20, 21])]
    segments = [Segment(2, 4, 1, 3, 0, 2), Segment(7, 9, 0, 2, 1, 2)]
    level = level_columns(segments, [0, 5, 6, 9, 12], 12, tables, page_size=16)
    level.check(16)
    assert list(level.qo_indptr) == [0, 2, 4, 5, 6, 7, 9, 12]
    assert [list(level.pages(i)) for i in range(level.num_segments)] == [[], [11, 12], [], [], [], [20, 21], []]
    assert list(level.kv_last_page_len) == [0, 16, 0, 0, 0, 16, 0]


@pytest.mark.parametrize("above", [[], [0, 4]])
def test_a_level_of_one_segment_for_all_rows(above: list[int]) -> None:
    level = level_columns([Segment(0, 4, 0, 1, 0, 2)], above, 4, [array("i", [7])], page_size=8)
    assert list(level.qo_indptr) == [0, 4]
    assert list(level.kv_page_indices) == [7]
