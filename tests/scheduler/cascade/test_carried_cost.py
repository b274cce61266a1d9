"""Piecewise linear costs against tables: one entry for each start page, and deep trees one decision at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows
from functools import cache
from itertools import pairwise, product

import pytest

from cascade_llm.scheduler.cascade.carried_cost import CarriedCost, line_at
from cascade_llm.scheduler.cascade.choice import SegmentCosts, TokensRead
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS
from cascade_llm.scheduler.cascade.tree import Run, preorder
from tests.scheduler.forests import choose_segments
from tests.scheduler.generated import random_costs

SHAPE = AttentionShape(num_qo_heads=32, num_kv_heads=8, head_dim=128, kv_dtype_bytes=2)


def test_sums_and_minima_equal_tables() -> None:
    rng, ranges = random.Random(0), set[str]()
    for _ in range(500):
        last_start = 40
        pairs: list[tuple[CarriedCost, list[float]]] = []
        for _ in range(rng.randrange(2, 20)):
            if len(pairs) < 2 or rng.random() < 0.3:
                line = complex(rng.randrange(200, 400), rng.randrange(10))
                pairs.append((CarriedCost(line), [line_at(line, start) for start in range(41)]))
                continue
            function, table = pairs.pop(rng.randrange(len(pairs)))
            if rng.random() < 0.4:
                other, other_table = pairs.pop(rng.randrange(len(pairs)))
                function.add(other)
                table = [a + b for a, b in zip(table, other_table, strict=True)]
            line = complex(rng.randrange(200, 400) * rng.choice((1, 2)), rng.randrange(12))
            cheaper = [start for start in range(last_start + 1) if line_at(line, start) < table[start]]
            found = function.undercut(line, last_start)
            assert list(found) == cheaper
            ranges.add("none" if not found else "first" if found.start == 0 else "last" if 40 in found else "middle")
            pairs.append((function, [min(a, line_at(line, start)) for start, a in enumerate(table)]))
            if rng.random() < 0.3:
                line = complex(rng.randrange(5), rng.randrange(5))
                pairs[-1][0].add_line(line)
                pairs[-1] = pairs[-1][0], [a + line_at(line, start) for start, a in enumerate(pairs[-1][1])]
        for function, table in pairs:
            end = last_start
            while end >= 0:
                assert function.end_at(end) == pytest.approx(table[end])
                end -= rng.randrange(1, 9)
    assert ranges == {"none", "first", "middle", "last"}


def deep_tree(rng: random.Random, num_runs: int) -> tuple[Run, list[int]]:
    """A tree in which runs hang below recent ones, so that most of them are far down."""
    top = Run(0, 0)
    runs, num_new = [top], list[int]()
    for _ in range(num_runs):
        parent = rng.choice(runs[-3:])
        run = Run(parent.end, parent.end + rng.choice((1, 1, 1, 3, 20)))
        parent.children.append(run)
        runs.append(run)
    for run in runs:
        for _ in range(rng.choice((0, 1, 1, 2)) if run.children else 2):
            run.members.append(len(num_new))
            num_new.append(rng.choice((1, 1, 1, 9)))
    for run in reversed(preorder(top)):
        run.num_sequences = len(run.members) + sum(child.num_sequences for child in run.children)
        run.num_rows = sum(num_new[i] for i in run.members) + sum(child.num_rows for child in run.children)
    return top, num_new


def tabulated(top: Run, num_new: Rows[int], page_size: int, costs: SegmentCosts, max_levels: int, least: int) -> float:
    """The least cost by the same recurrence, for each start page and number of levels by itself."""

    @cache
    def below(run: Run, start: int, left: int) -> float:
        tokens = (run.end - start) * page_size
        folded = sum(costs.leaf_tokens_s(tokens, num_new[i]) for i in run.members)
        folded += sum(below(child, start, left) for child in run.children)
        if run is top or not left or tokens < least:
            return folded
        nothing_carried = sum(below(child, run.end, left - 1) for child in run.children)
        return min(folded, nothing_carried + costs.shared_segment_s(tokens, run.num_rows))

    return min(below(top, 0, levels) + levels * costs.level_s(top.num_rows) for levels in range(max_levels + 1))


def price(top: Run, start_pages: dict[Run, int], num_new: Rows[int], page_size: int, costs: SegmentCosts) -> float:
    """Segments and leaves of a choice, without its levels."""
    cost = sum(costs.shared_segment_s((r.end - s) * page_size, r.num_rows) for r, s in start_pages.items())
    stack = [(top, 0)]
    while stack:
        run, start = stack.pop()
        if run in start_pages:
            assert start == start_pages[run]
            start = run.end
        cost += sum(costs.leaf_tokens_s((run.end - start) * page_size, num_new[i]) for i in run.members)
        stack.extend((child, start) for child in run.children)
    return cost


@pytest.mark.parametrize("name", ["cpu", "h200", "tokens", "random"])
def test_deep_trees_cost_what_tables_say(name: str) -> None:
    rng, most_levels = random.Random(name), 0
    for _ in range(40):
        costs: SegmentCosts = TokensRead()
        if name == "random":
            costs = random_costs(rng)
        elif name != "tokens":
            costs = CostModel(SHAPE, DEVICE_COSTS[name])
        top, num_new = deep_tree(rng, rng.randrange(1, 90))
        page_size, max_levels = rng.choice((1, 16, 64)), rng.randrange(1, 5)
        min_tokens = rng.choice((1, 1, 3 * page_size, 40 * page_size))
        choice = choose_segments(top, num_new, page_size, costs, max_levels=max_levels, min_tokens=min_tokens)
        found = price(top, choice.start_pages, num_new, page_size, costs)
        found += choice.num_levels * costs.level_s(sum(num_new))
        assert found == pytest.approx(tabulated(top, num_new, page_size, costs, max_levels, min_tokens), rel=1e-9)
        most_levels = max(most_levels, choice.num_levels)
    assert most_levels >= 3


def test_eight_thousand_sequences_each_sharing_one_page_more() -> None:
    num_runs = 8000
    top = Run(0, 0)
    spine = [top]
    for index in range(num_runs):
        run = Run(index, index + 1)
        run.members = [index, index + 1] if index == num_runs - 1 else [index]
        spine[-1].children = [run]
        spine.append(run)
    for below, run in enumerate(reversed(spine[1:]), start=2):
        run.num_sequences = run.num_rows = below
    top.num_sequences = top.num_rows = num_runs + 1
    num_new = [1] * (num_runs + 1)
    for max_levels in (1, 2, 3):
        choice = choose_segments(top, num_new, 1, TokensRead(), max_levels=max_levels, min_tokens=1)
        assert choice.num_levels == len(choice.start_pages) == max_levels
        ends = sorted(run.end for run in choice.start_pages)
        around = (range(end - 2, end + 3) for end in ends)
        assert pages_saved(ends, num_runs) == max(pages_saved(near, num_runs) for near in product(*around))
        assert ends == pytest.approx([num_runs * (i + 1) / (max_levels + 1) for i in range(max_levels)], abs=2)


def pages_saved(ends: Rows[int], num_runs: int) -> int:
    """By segments that end after these pages: each is read once, not by all sequences that reach its end."""
    return sum((end - start) * (num_runs + 1 - end) for start, end in pairwise((0, *ends)))
