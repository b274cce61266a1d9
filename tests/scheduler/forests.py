"""Random trees of shared runs."""

from __future__ import annotations

import random
from collections.abc import Sequence as Rows

from cascade_llm.scheduler.cascade.choice import SegmentChoice, SegmentCosts, choices_by_levels
from cascade_llm.scheduler.cascade.tree import Run, preorder

__all__ = ["all_runs", "choose_segments", "paths_to_sequences", "random_forest"]


def random_forest(rng: random.Random, max_runs: int) -> tuple[Run, list[int]]:
    """An empty root over at most `max_runs` runs, and the number of rows of each sequence."""
    num_new: list[int] = []
    row_counts = rng.choice(((1,), (1, 1, 1, 7), (1, 5, 40)))

    def grow(run: Run, num_runs: int) -> None:
        while num_runs:
            size = rng.randrange(1, num_runs + 1)
            child = Run(run.end, run.end + rng.choice((1, 1, 2, 5, 30)))
            grow(child, size - 1)
            run.children.append(child)
            num_runs -= size
        fewest = 0 if run.start == run.end or len(run.children) > 1 else 2 - len(run.children)
        for _ in range(rng.choice((fewest, fewest, fewest + 1, fewest + 3))):
            run.members.append(len(num_new))
            num_new.append(rng.choice(row_counts))
        run.num_sequences = len(run.members) + sum(c.num_sequences for c in run.children)
        run.num_rows = sum(num_new[i] for i in run.members) + sum(c.num_rows for c in run.children)

    top = Run(0, 0)
    grow(top, rng.randrange(max_runs + 1))
    return top, num_new


def all_runs(top: Run) -> list[Run]:
    """All runs but the root, parents first."""
    return [run for child in top.children for run in (child, *all_runs(child))]


def paths_to_sequences(top: Run) -> dict[int, list[Run]]:
    """For each sequence the runs on its path, without the root."""
    paths: dict[int, list[Run]] = {}

    def walk(run: Run, path: list[Run]) -> None:
        for index in run.members:
            paths[index] = path
        for child in run.children:
            walk(child, [*path, child])

    walk(top, [])
    return paths


def choose_segments(
    top: Run, num_new: Rows[int], page_size: int, costs: SegmentCosts, *, max_levels: int, min_tokens: int
) -> SegmentChoice:
    """The cheapest of the best choices of each number of levels, levels paid for; none is a choice too."""
    choices = choices_by_levels(top, num_new, page_size, costs, max_levels=max_levels, min_tokens=min_tokens)

    def cost_of(choice: SegmentChoice) -> float:
        total = choice.num_levels * costs.level_s(sum(num_new))
        above = {top: 0}
        for run in preorder(top):
            start = above[run]
            if run in choice.start_pages:
                assert choice.start_pages[run] == start
                total += costs.shared_segment_s((run.end - start) * page_size, run.num_rows)
                start = run.end
            above.update(dict.fromkeys(run.children, start))
            total += sum(costs.leaf_tokens_s((run.end - start) * page_size, num_new[i]) for i in run.members)
        return total

    return min([SegmentChoice({}, 0), *choices], key=cost_of)
