"""The choice of segments is the cheapest there is: compared with every subset of the runs, priced path by path."""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows
from itertools import combinations

import pytest

from cascade_llm.scheduler.cascade.choice import SegmentChoice, SegmentCosts, TokensRead
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS
from cascade_llm.scheduler.cascade.tree import Run
from tests.scheduler.forests import all_runs, choose_segments, paths_to_sequences, random_forest
from tests.scheduler.generated import random_costs

SHAPE = AttentionShape(num_qo_heads=32, num_kv_heads=8, head_dim=128, kv_dtype_bytes=2)


def price(
    top: Run, chosen: set[Run], num_new: Rows[int], page_size: int, costs: SegmentCosts
) -> tuple[float, int, dict[Run, int]]:
    """Cost, levels and first pages of the segments, worked out for each sequence's path by itself."""
    cost, num_levels, start_pages = 0.0, 0, dict[Run, int]()
    for index, path in paths_to_sequences(top).items():
        start = depth = 0
        for run in path:
            if run in chosen:
                start_pages[run] = start
                start, depth = run.end, depth + 1
        num_levels = max(num_levels, depth)
        end = path[-1].end if path else 0
        cost += costs.leaf_tokens_s((end - start) * page_size, num_new[index]) if end > start else 0.0
    for run, start in start_pages.items():
        cost += costs.shared_segment_s((run.end - start) * page_size, run.num_rows)
    return cost + num_levels * costs.level_s(sum(num_new)), num_levels, start_pages


def cheapest(
    top: Run, num_new: Rows[int], page_size: int, costs: SegmentCosts, max_levels: int, min_tokens: int
) -> float:
    """The least cost of all allowed subsets."""
    runs, least = all_runs(top), float("inf")
    for size in range(len(runs) + 1):
        for subset in combinations(runs, size):
            cost, num_levels, starts = price(top, set(subset), num_new, page_size, costs)
            if num_levels <= max_levels and all((r.end - s) * page_size >= min_tokens for r, s in starts.items()):
                least = min(least, cost)
    return least


def check_choice(
    top: Run, num_new: Rows[int], page_size: int, costs: SegmentCosts, max_levels: int, min_tokens: int
) -> SegmentChoice:
    choice = choose_segments(top, num_new, page_size, costs, max_levels=max_levels, min_tokens=min_tokens)
    cost, num_levels, start_pages = price(top, set(choice.start_pages), num_new, page_size, costs)
    assert choice.start_pages == start_pages
    assert choice.num_levels == num_levels <= max_levels
    assert all((run.end - start) * page_size >= min_tokens for run, start in start_pages.items())
    least = cheapest(top, num_new, page_size, costs, max_levels, min_tokens)
    assert cost == pytest.approx(least, rel=1e-9)
    return choice


@pytest.mark.parametrize("name", ["cpu", "h200", "tokens", "random"])
def test_no_subset_of_the_runs_is_cheaper(name: str) -> None:
    rng, numbers_of_levels = random.Random(name), set()
    for _ in range(150):
        costs: SegmentCosts = TokensRead()
        if name == "random":
            costs = random_costs(rng)
        elif name != "tokens":
            costs = CostModel(SHAPE, DEVICE_COSTS[name])
        top, num_new = random_forest(rng, 7)
        page_size = rng.choice((1, 16, 64))
        for max_levels in range(4):
            choice = check_choice(top, num_new, page_size, costs, max_levels, rng.choice((1, 1, 3 * page_size)))
            numbers_of_levels.add(choice.num_levels)
    assert {0, 1} < numbers_of_levels, "the cases are too much alike"


def run_of(start: int, end: int, *parts: Run | int) -> Run:
    """A run with these children and sequences, one row each."""
    run = Run(start, end)
    run.children = [part for part in parts if isinstance(part, Run)]
    run.members = [part for part in parts if isinstance(part, int)]
    run.num_sequences = run.num_rows = len(run.members) + sum(child.num_rows for child in run.children)
    return run


def test_with_one_level_the_run_that_saves_most_wins() -> None:
    inner = run_of(2, 12, 0, 1, 2, 3)
    outer = run_of(0, 2, inner, 4, 5)
    choice = choose_segments(run_of(0, 0, outer), [1] * 6, 16, TokensRead(), max_levels=1, min_tokens=1)
    assert choice == SegmentChoice({inner: 0}, 1), "the outer run is read with it"
    choice = choose_segments(run_of(0, 0, outer), [1] * 6, 16, TokensRead(), max_levels=2, min_tokens=1)
    assert choice == SegmentChoice({outer: 0, inner: 2}, 2)


def test_short_runs_are_folded_into_what_is_below_them() -> None:
    inner = run_of(2, 5, 0, 1)
    outer = run_of(0, 2, inner, 2)
    top = run_of(0, 0, outer)
    for min_tokens, starts in ((1, {outer: 0, inner: 2}), (9, {inner: 0}), (20, {inner: 0}), (21, {})):
        choice = choose_segments(top, [1] * 3, 4, TokensRead(), max_levels=3, min_tokens=min_tokens)
        assert choice.start_pages == starts


def test_nothing_to_share_and_no_levels() -> None:
    top = run_of(0, 0, 0, 1)
    assert choose_segments(top, [1, 1], 4, TokensRead(), max_levels=3, min_tokens=1) == SegmentChoice({}, 0)
    top = run_of(0, 0, run_of(0, 100, 0, 1))
    assert choose_segments(top, [1, 1], 4, TokensRead(), max_levels=0, min_tokens=1) == SegmentChoice({}, 0)


@pytest.mark.parametrize("device", DEVICE_COSTS)
def test_a_long_prefix_of_many_is_shared_and_a_short_one_of_two_is_not(device: str) -> None:
    costs = CostModel(SHAPE, DEVICE_COSTS[device])
    system = run_of(0, 128, *range(64))
    choice = choose_segments(run_of(0, 0, system), [1] * 64, 16, costs, max_levels=2, min_tokens=1)
    assert choice == SegmentChoice({system: 0}, 1)
    choice = choose_segments(run_of(0, 0, run_of(0, 1, 0, 1)), [1, 1], 16, costs, max_levels=2, min_tokens=1)
    assert choice == SegmentChoice({}, 0)
