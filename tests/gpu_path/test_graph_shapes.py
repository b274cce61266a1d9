"""Graph shapes: few, ordered, and one for every decode plan that the planner makes."""

from __future__ import annotations

import random

import pytest

from cascade_llm.plan import CascadePlan
from cascade_llm.worker.graph_shapes import GraphShape, fitting_shape, graph_shapes, row_buckets
from tests.cascade_cases import make_level
from tests.doubles.planner import cta_tile_q


def plan_of(*levels: list[int], lone: int = 0) -> CascadePlan:
    """A decode plan from the rows of each level's segments; `lone` rows at the end share nothing."""
    num_rows = sum(levels[0]) + lone
    shared, page = [], 0
    for sizes in levels:
        segments: list[tuple[int, list[int], int]] = []
        for size in sizes:
            segments.append((size, [page], 16))
            page += 1
        if lone:
            segments.append((lone, [], 0))
        shared.append(make_level(segments))
    leaf = make_level([(1, [page + i], 1) for i in range(num_rows)])
    plan = CascadePlan((*shared, leaf), 16)
    plan.check()
    return plan


def test_buckets_end_at_the_largest_step() -> None:
    assert row_buckets(1) == (1,)
    assert row_buckets(100) == (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100)
    assert row_buckets(256)[-3:] == (192, 224, 256)
    assert row_buckets(1000)[-4:] == (640, 768, 896, 1000)


@pytest.mark.parametrize(
    ("max_rows", "group_size", "levels", "most"), [(256, 4, 2, 80), (256, 1, 1, 50), (512, 8, 3, 180)]
)
def test_the_number_of_graphs_is_bounded(max_rows: int, group_size: int, levels: int, most: int) -> None:
    shapes = graph_shapes(max_rows, group_size, levels)
    assert len(shapes) == len(set(shapes)) <= most
    assert [shape.rows for shape in shapes] == sorted((shape.rows for shape in shapes), reverse=True)
    assert {len(shape.capacities) for shape in shapes} == set(range(levels + 1))
    assert all(0 < capacity <= shape.rows for shape in shapes for capacity in shape.capacities)


@pytest.mark.parametrize("group_size", [2, 4, 8])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_capacities_select_the_tile_that_they_are_meant_to(group_size: int, rows: int) -> None:
    wide, narrow = (shape.capacities[0] for shape in graph_shapes(rows, group_size, 1)[:2])
    if narrow < wide:
        wide, narrow = narrow, wide
    assert cta_tile_q((rows - wide + 1) * group_size, 128) == 128
    assert cta_tile_q((rows - narrow + 1) * group_size, 128) == 64


def test_large_segments_take_the_wide_tile_and_small_ones_the_narrow() -> None:
    shapes = graph_shapes(256, 4, 2)
    one_prefix = fitting_shape(plan_of([200]), shapes, 4)
    assert one_prefix == GraphShape(224, (28,))
    pairs = fitting_shape(plan_of([2] * 100), shapes, 4)
    assert pairs == GraphShape(224, (220,))
    both = fitting_shape(plan_of([200], [2] * 100), shapes, 4)
    assert both == GraphShape(224, (28, 220))


def test_padding_rows_need_a_segment_unless_the_last_is_empty() -> None:
    shapes = [GraphShape(8, (2,)), GraphShape(16, (4,))]
    assert fitting_shape(plan_of([2, 2]), shapes, 4) == GraphShape(16, (4,))
    assert fitting_shape(plan_of([4], lone=2), shapes, 4) == GraphShape(8, (2,))
    assert fitting_shape(plan_of([4, 4]), shapes, 4) == GraphShape(8, (2,))


def test_what_fits_nowhere_has_no_shape() -> None:
    shapes = graph_shapes(16, 4, 1)
    assert fitting_shape(plan_of([17]), shapes, 4) is None
    assert fitting_shape(plan_of([8], [4, 4]), shapes, 4) is None


@pytest.mark.parametrize("group_size", [1, 2, 4, 7])
def test_nearly_every_forest_fits(group_size: int) -> None:
    """At the largest step a plan may need a segment more than the narrow tile allows; below, the next bucket has it."""
    rng, shapes = random.Random(group_size), graph_shapes(256, group_size, 2)
    for _ in range(300):
        coarse = [rng.randrange(2, 12) for _ in range(rng.randrange(1, 20))]
        fine = [part for size in coarse for part in (size // 2, size - size // 2) if part]
        plan = plan_of(coarse, fine, lone=rng.randrange(3))
        shape = fitting_shape(plan, shapes, group_size)
        assert shape is not None
        assert shape.rows >= plan.num_rows
        assert all(
            level.num_segments <= capacity for level, capacity in zip(plan.shared_levels, shape.capacities, strict=True)
        )
