"""Which level each chosen run goes to, and whose own pages are worth a segment, on a device of many processors.

A run must be on a deeper level than the chosen runs above it; beyond that it is free. On a GPU it matters which
segments share a level (`tiling`): a level with many tiles cuts no K/V, so that one long segment among many short ones
runs on a few processors while the others wait; and small segments beside large ones compute in tiles that are mostly
padding. The same holds for leaves, where rows are many: a sequence much longer than the others holds them all up,
unless its own pages are a segment, of one row, on a level that has few.

So a few arrangements are priced, where the cost model sees something to gain, and the cheapest whole plan is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from cascade_llm.scheduler.cascade.choice import SegmentChoice
from cascade_llm.scheduler.cascade.cost_model import CostModel, PlanWork
from cascade_llm.scheduler.cascade.layout import Placement, place_segments
from cascade_llm.scheduler.cascade.tree import PlannedRows, Run, preorder

__all__ = ["LevelBalancer", "Levels", "arrangements", "levels_by_depth", "with_own_runs"]

Levels = dict[Run, int]
"""The level of each chosen run; 0 is the coarsest."""


class LevelBalancer:
    """Rearranges what was chosen, for one device."""

    def __init__(self, costs: CostModel, page_size: int, max_levels: int) -> None:
        """`max_levels`: above the leaf."""
        assert costs.is_tiled
        self._costs, self._page_size, self._max_levels = costs, page_size, max_levels

    def balanced(
        self, forest: Run, choice: SegmentChoice, placement: Placement, rows: Sequence[PlannedRows], work: PlanWork
    ) -> Placement:
        """The cheapest of a few arrangements.

        Args:
            forest: of the step; runs of single sequences may be added to it
            choice: what is shared
            placement: of the choice, by depth
            rows: the sequences of the step
            work: of the plan that the placement makes
        """
        costs = self._costs
        if costs.imbalance_s(work) <= costs.level_s(0):
            return placement
        num_new = [row.num_new for row in rows]
        options = [(costs.leaf_s(work.leaf), choice)]
        own_ends = self._own_ends(rows, placement.prefix_pages, work)
        if own_ends:
            more = with_own_runs(forest, choice, placement.prefix_pages, own_ends, num_new, self._max_levels)
            options.append((costs.leaf_s(self._leaf_without(more, work)), more))
        best_s, best = costs.leaf_s(work.leaf) + costs.levels_s(work.shared, sum(num_new)), (choice, Levels())
        for leaf_s, option in options:
            for levels in arrangements(forest, option, self._page_size, costs, self._max_levels):
                seconds = leaf_s + costs.levels_s(self._segments(option, levels), sum(num_new))
                if seconds < best_s:
                    best_s, best = seconds, (option, levels)
        return place_segments(forest, best[0], num_new, best[1]) if best[1] else placement

    def _own_ends(self, rows: Sequence[PlannedRows], prefix_pages: Sequence[int], work: PlanWork) -> dict[int, int]:
        """The pages at which runs of single sequences may end, for those whose leaf would hold the others up."""
        size, longest = self._page_size, self._costs.longest_balanced(work.leaf)
        return {
            index: min(row.sequence.tail.end, row.start_len // size)
            for index, row in enumerate(rows)
            if row.sequence.tail and row.start_len + row.num_new - size * prefix_pages[index] > longest
        }

    def _leaf_without(self, choice: SegmentChoice, work: PlanWork) -> list[tuple[int, int]]:
        """The leaf, less what runs of single sequences take from it."""
        leaf = list(work.leaf)
        for run, start in choice.start_pages.items():
            if run.num_sequences == 1:
                tokens, num_rows = leaf[run.members[0]]
                leaf[run.members[0]] = tokens - (run.end - start) * self._page_size, num_rows
        return leaf

    def _segments(self, choice: SegmentChoice, levels: Levels) -> list[list[tuple[int, int]]]:
        """(tokens, rows) of the segments of each level."""
        segments: list[list[tuple[int, int]]] = [[] for _ in range(max(levels.values(), default=-1) + 1)]
        for run, start in choice.start_pages.items():
            segments[levels[run]].append(((run.end - start) * self._page_size, run.num_rows))
        return segments


def levels_by_depth(forest: Run, choice: SegmentChoice) -> Levels:
    """As high up as the chosen runs above it allow: as few levels as there can be."""
    return _levels(forest, choice.start_pages, choice.num_levels, lambda run: True)


def arrangements(
    forest: Run, choice: SegmentChoice, page_size: int, costs: CostModel, max_levels: int
) -> Iterator[Levels]:
    """Ways to spread chosen runs over levels: by depth; the long ones, the wide ones, or both, before the rest, in as
    many levels as they need by depth, or one more."""
    starts = choice.start_pages
    tokens = {run: (run.end - start) * page_size for run, start in starts.items()}
    longest = costs.longest_balanced([(tokens[run], run.num_rows) for run in starts])
    long = {run for run in starts if tokens[run] > longest}
    wide = {run for run in starts if costs.is_wide(run.num_rows)}
    seen = [levels_by_depth(forest, choice)]
    yield seen[0]
    for num_levels in range(choice.num_levels, min(choice.num_levels + 1, max_levels) + 1):
        for first in (long, wide, long | wide):
            levels = _levels(forest, starts, num_levels, first.__contains__)
            if levels not in seen:
                seen.append(levels)
                yield levels


def with_own_runs(
    forest: Run,
    choice: SegmentChoice,
    prefix_pages: Sequence[int],
    own_ends: Mapping[int, int],
    num_new: Sequence[int],
    max_levels: int,
) -> SegmentChoice:
    """The choice with runs of single sequences added, to it and to the forest.

    Args:
        forest: all shared runs; changed
        choice: of them
        prefix_pages: for each sequence the pages that chosen runs cover
        own_ends: for some sequences, the page at which a run of their own would end
        num_new: rows of each sequence
        max_levels: a sequence with so many chosen runs above it gets none
    """
    start_pages, most = dict(choice.start_pages), choice.num_levels
    depths = {forest: 0}
    for run in preorder(forest):
        depth = depths[run]
        depths.update((child, depth + (child in start_pages)) for child in run.children)
        for index in [i for i in run.members if own_ends.get(i, 0) > prefix_pages[i]]:
            if depth < max_levels:
                own = Run(run.end, own_ends[index])
                own.members, own.num_sequences, own.num_rows = [index], 1, num_new[index]
                run.members.remove(index)
                run.children.append(own)
                start_pages[own] = prefix_pages[index]
                most = max(most, depth + 1)
    return SegmentChoice(start_pages, most)


def _levels(forest: Run, chosen: Mapping[Run, int], num_levels: int, first: Callable[[Run], bool]) -> Levels:
    """Runs that come `first` as high up as those above them allow, the others as far down as those below them do.

    Levels that stay without a run are left out.
    """
    order, below = preorder(forest), dict[Run, int]()
    for run in reversed(order):
        below[run] = max([below[child] + (child in chosen) for child in run.children], default=0)
    levels: Levels = {}
    above = {forest: -1}
    for run in order:
        if run in chosen:
            levels[run] = above[run] + 1 if first(run) else num_levels - 1 - below[run]
        for child in run.children:
            above[child] = levels.get(run, above[run])
    used = {level: i for i, level in enumerate(sorted(set(levels.values())))}
    return {run: used[level] for run, level in levels.items()}
