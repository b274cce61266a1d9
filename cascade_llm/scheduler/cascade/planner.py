"""From the sequences of a step to its cascade plan.

1. The sequences' paths in the prefix tree give the tree of shared runs (`prefix_forest`).
2. A cost model decides which runs become segments of a level (`segment_choice`), and on a device of many processors
   which level each goes to (`level_arrangement`).
3. A depth-first walk orders the rows, so that sharers are neighbours, and the levels are written down
   (`cascade_layout`).

All of this depends on which sequences are there, where their paths end and how many rows each has. While that does not
change, the shared levels are kept as they are, and only the leaf is new. From one decode step to the next even the leaf
is made from the one before (`plan_next`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import add
from typing import NamedTuple

from cascade_llm.config import CascadeConfig
from cascade_llm.plan import CascadeLevel, CascadePlan, CascadeReport, IntColumn, int_column
from cascade_llm.scheduler.cascade.balance import LevelBalancer, levels_by_depth
from cascade_llm.scheduler.cascade.choice import SegmentChoice, SegmentCosts, TokensRead, choices_by_levels
from cascade_llm.scheduler.cascade.cost_model import CostModel, PlanWork
from cascade_llm.scheduler.cascade.layout import Placement, Segment, leaf_columns, level_columns, place_segments
from cascade_llm.scheduler.cascade.tree import PlannedRows, Run, attach_nodes, preorder, shared_forest
from cascade_llm.scheduler.cascade.windows import WindowPlanner
from cascade_llm.scheduler.prefix_cache import RadixNode
from cascade_llm.scheduler.sequence import Sequence

__all__ = ["CascadePlanner", "PlannedCascade"]


class PlannedCascade(NamedTuple):
    """A plan, the sequences in the order of its leaf segments, and what it shares."""

    plan: CascadePlan
    order: list[int]
    """Leaf segment i belongs to sequence `order[i]` of the step."""
    report: CascadeReport
    windowed: tuple[CascadePlan, ...] = ()
    """Of the attention kinds with a window, in their order, over the same rows."""


@dataclass(slots=True)
class _Layout:
    """Everything of a plan that outlives a step, and what it was made for."""

    sequences: list[Sequence]
    nodes: list[RadixNode]
    num_new: list[int]
    placement: Placement
    levels: tuple[CascadeLevel, ...]
    report: CascadeReport
    """Its token counts are those of the shared levels alone: read once, and as often as a one-level plan does."""


class CascadePlanner:
    """Plans the shared levels and the leaf of each step; owned by the scheduler, whose sequences it only reads."""

    def __init__(
        self,
        page_size: int,
        config: CascadeConfig,
        costs: SegmentCosts,
        root: RadixNode,
        window_lens: Iterable[int] = (),
    ) -> None:
        """`window_lens`: of the attention kinds beside the one that reads all earlier tokens."""
        self._page_size = page_size
        self._max_shared_levels = config.max_shared_levels
        self._min_tokens = config.shared_prefix_len
        self._costs = costs if config.shared_prefix_len is None else TokensRead()
        self._balancer: LevelBalancer | None = None
        if isinstance(costs, CostModel) and costs.is_tiled and costs.costs.measured:
            self._balancer = LevelBalancer(costs, page_size, self._max_shared_levels)
        self._windows = [WindowPlanner(page_size, window_len) for window_len in window_lens]
        self._root = root
        self._layout: _Layout | None = None
        self._last: PlannedCascade | None = None

    def plan(self, rows: list[PlannedRows]) -> PlannedCascade:
        """The cascade plan of a step. `rows`: each scheduled sequence once, its new pages in its table already."""
        layout = self._kept_layout(rows)
        kv_tokens = sum([row.start_len + row.num_new for row in rows])
        placement = layout.placement
        leaf = leaf_columns(placement.order, placement.prefix_pages, rows, self._page_size)
        planned = self._planned(layout, leaf, kv_tokens)
        if not self._windows:
            return planned
        return planned._replace(windowed=tuple([window.plan(placement, rows) for window in self._windows]))

    def plan_next(self, new_pages: list[tuple[int, int]]) -> PlannedCascade:
        """The plan after the last one, when each of its sequences goes on by one token and shares what it shared.

        Shared levels, and columns of the leaf that are as before, are the same objects. Not for attention kinds with a
        window.

        Args:
            new_pages: (leaf segment, page id) of the sequences whose token is the first of a page, in order
        """
        layout, last = self._layout, self._last
        assert layout is not None
        assert last is not None
        leaf = last.plan.leaf
        last_page_len = [length + 1 for length in leaf.kv_last_page_len]
        for segment, _ in new_pages:
            last_page_len[segment] = 1
        page_indptr, page_indices = leaf.kv_page_indptr, leaf.kv_page_indices
        if new_pages:
            page_indptr, page_indices = _with_pages(leaf, new_pages)
        leaf = CascadeLevel(leaf.qo_indptr, page_indptr, page_indices, int_column(last_page_len))
        return self._planned(layout, leaf, last.report.kv_tokens_one_level + len(last_page_len))

    def _planned(self, layout: _Layout, leaf: CascadeLevel, kv_tokens: int) -> PlannedCascade:
        """`kv_tokens`: of all sequences, as many as a one-level plan reads."""
        shared = layout.report
        report = replace(shared, kv_tokens_one_level=kv_tokens, kv_tokens_read=kv_tokens - shared.kv_tokens_saved)
        plan = CascadePlan((*layout.levels, leaf), self._page_size)
        self._last = PlannedCascade(plan, layout.placement.order, report)
        return self._last

    def _kept_layout(self, rows: list[PlannedRows]) -> _Layout:
        """The layout of the last step where nothing that it depends on has changed, else a new one."""
        sequences = [row.sequence for row in rows]
        nodes = attach_nodes(rows, self._page_size)
        num_new = [row.num_new for row in rows]
        kept = self._layout
        if kept and kept.sequences == sequences and kept.nodes == nodes and kept.num_new == num_new:
            return kept
        self._layout = self._new_layout(sequences, nodes, num_new, *self._place(rows, nodes, num_new))
        return self._layout

    def _new_layout(
        self,
        sequences: list[Sequence],
        nodes: list[RadixNode],
        num_new: list[int],
        placement: Placement,
        reason: str | None,
    ) -> _Layout:
        segments_by_level = placement.levels
        tables = [sequence.pages for sequence in sequences]
        num_rows = sum(num_new)
        levels: list[CascadeLevel] = []
        for segments in segments_by_level:
            above = levels[-1].qo_indptr.tolist() if levels else []
            levels.append(level_columns(segments, above, num_rows, tables, self._page_size))
        groups = [segment for segments in segments_by_level for segment in segments if segment.num_sequences > 1]
        report = CascadeReport(
            num_levels=len(levels) + 1,
            num_groups=len(groups),
            grouped_rows=_num_rows_in(groups),
            kv_tokens_read=self._page_size * sum(s.num_pages for s in groups),
            kv_tokens_one_level=self._page_size * sum(s.num_pages * s.num_sequences for s in groups),
            reason=reason,
        )
        return _Layout(sequences, nodes, num_new, placement, tuple(levels), report)

    def _place(
        self, rows: list[PlannedRows], nodes: list[RadixNode], num_new: list[int]
    ) -> tuple[Placement, str | None]:
        """The segments of the levels above the leaf, and the reason why none of them is shared."""
        plain = Placement(list(range(len(rows))), [], [0] * len(rows))
        if not self._max_shared_levels:
            return plain, "cascade attention is off"
        if len(nodes) == 1:
            return plain, "one sequence"
        forest = shared_forest(nodes, num_new, self._root)
        kv_lens = [row.start_len + row.num_new for row in rows]
        choice, shared = self._choose(forest, num_new, kv_lens)
        placement, reason = (plain, shared) if isinstance(shared, str) else (shared, None)
        if self._balancer is not None:
            work = self._work(placement, num_new, kv_lens)
            placement = self._balancer.balanced(forest, choice, placement, rows, work)
        return placement, reason

    def _choose(self, forest: Run, num_new: list[int], kv_lens: list[int]) -> tuple[SegmentChoice, Placement | str]:
        """What is shared and where, or the reason why nothing is."""
        nothing = SegmentChoice({}, 0)
        if not forest.children:
            return nothing, "no two sequences share a full page"
        common, reread = _tokens_in_common(forest, self._page_size)
        costs = self._costs.with_common_tokens(common)
        least, most = self._min_tokens or 1, self._max_shared_levels
        one_level = PlanWork((), list(zip(kv_lens, num_new, strict=True)), reread, common)
        best_s, best = self._costs.plan_s(one_level), None
        for choice in choices_by_levels(forest, num_new, self._page_size, costs, max_levels=most, min_tokens=least):
            placement = place_segments(forest, choice, num_new, levels_by_depth(forest, choice))
            seconds = self._costs.plan_s(self._work(placement, num_new, kv_lens))
            if seconds < best_s:
                best_s, best = seconds, (choice, placement)
        if best is not None:
            return best
        if self._min_tokens is None:
            return nothing, "the cost model expects no gain"
        return nothing, f"no shared run of {self._min_tokens} tokens (cascade_shared_prefix_len)"

    def _work(self, placement: Placement, num_new: list[int], kv_lens: list[int]) -> PlanWork:
        size = self._page_size
        shared = [[(s.num_pages * size, s.last_row - s.first_row) for s in level] for level in placement.levels]
        own_lens = [kv_len - size * pages for kv_len, pages in zip(kv_lens, placement.prefix_pages, strict=True)]
        return PlanWork(shared, list(zip(own_lens, num_new, strict=True)))


def _num_rows_in(segments: list[Segment]) -> int:
    """Rows in at least one of them."""
    rows = end = 0
    for segment in sorted(segments):
        rows += max(0, segment.last_row - max(end, segment.first_row))
        end = max(end, segment.last_row)
    return rows


def _tokens_in_common(forest: Run, page_size: int) -> tuple[int, int]:
    """Different tokens that at least two sequences read, and how often these are read again in a one-level plan."""
    runs = [(run.end - run.start, run.num_sequences) for run in preorder(forest)]
    common, read = sum([pages for pages, _ in runs]), sum([pages * readers for pages, readers in runs])
    return page_size * common, page_size * (read - common)


def _with_pages(leaf: CascadeLevel, new_pages: list[tuple[int, int]]) -> tuple[IntColumn, IntColumn]:
    """`kv_page_indptr` and `kv_page_indices` with a page more at the end of some segments."""
    indptr, pages = leaf.kv_page_indptr.tolist(), array("i")
    before, width = leaf.kv_page_indices.cast("B"), pages.itemsize
    copied = 0
    for segment, page in new_pages:
        end = indptr[segment + 1] * width
        pages.frombytes(before[copied:end])
        pages.append(page)
        copied = end
    pages.frombytes(before[copied:])
    num_more = [0] * len(indptr)
    for segment, _ in new_pages:
        num_more[segment + 1] = 1
    return int_column(map(add, indptr, accumulate(num_more))), int_column(pages)
