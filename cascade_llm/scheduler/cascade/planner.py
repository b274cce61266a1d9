"""From the sequences of a step to its cascade plan.

1. The sequences' paths in the prefix tree give the tree of shared runs (`tree`).
2. A cost model decides which runs become segments of a level (`choice`), and on a device of many processors which
   level each goes to (`balance`).
3. A depth-first walk orders the rows, so that sharers are neighbours, and the levels are written down (`layout`).

All of this depends on which sequences are there, where their paths end and how many rows each has. While that does not
change, the shared levels are kept as they are, and only the leaf is new. From one decode step to the next even the leaf
is made from the one before (`plan_next`).

All attention kinds of a model have the same order of rows and share by one choice, made for the kind that reads most;
those with a window cut it (`windows`).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import add, mul
from typing import NamedTuple

from cascade_llm.config import CascadeConfig
from cascade_llm.plan import CascadeLevel, CascadePlan, CascadeReport, IntColumn, int_column
from cascade_llm.scheduler.cascade.balance import LevelBalancer, levels_by_depth
from cascade_llm.scheduler.cascade.choice import SegmentChoice, SegmentCosts, TokensRead, choices_by_levels
from cascade_llm.scheduler.cascade.cost_model import CostModel, PlanWork
from cascade_llm.scheduler.cascade.layout import (
    Placement,
    leaf_columns,
    leaf_row_columns,
    level_columns,
    place_segments,
    shared_report,
)
from cascade_llm.scheduler.cascade.tree import (
    PlannedRows,
    Run,
    attach_nodes,
    preorder,
    shared_forest,
    without_pages_before,
)
from cascade_llm.scheduler.cascade.windows import WindowPlanner, first_read_page
from cascade_llm.scheduler.prefix_cache import RadixNode
from cascade_llm.scheduler.sequence import Sequence

__all__ = ["CascadePlanner", "PlannedCascade"]

STRIDES_PER_WINDOW = 8
"""What is shared is chosen anew when the windows of all kinds have moved on by such a part of the widest."""


class PlannedCascade(NamedTuple):
    """A step's plans, the sequences in the order of their leaf segments, and what is shared."""

    plans: tuple[CascadePlan, ...]
    """One per attention kind, over the same rows."""
    order: list[int]
    """Leaf segment i belongs to sequence `order[i]` of the step."""
    report: CascadeReport
    kv_lens: list[int]
    """Tokens of K/V that a plan of one level reads, of each kind."""


@dataclass(slots=True)
class _Layout:
    """Everything of a plan that outlives a step, and what it was made for."""

    sequences: list[Sequence]
    nodes: list[RadixNode]
    num_new: list[int]
    first_page: int
    """Pages before are read by no sequence in any kind, nearly."""
    placement: Placement
    levels: tuple[CascadeLevel, ...]
    """Of the kind that reads all earlier tokens."""
    report: CascadeReport
    """Its token counts are those of the shared levels alone: read once, and as often as a one-level plan does."""
    reason: str | None
    """Why nothing was chosen to be shared."""


class CascadePlanner:
    """Plans the shared levels and the leaf of each step; owned by the scheduler, whose sequences it only reads."""

    def __init__(
        self,
        page_size: int,
        config: CascadeConfig,
        costs: SegmentCosts,
        root: RadixNode,
        kinds: Iterable[int | None] = (None,),
        layers_of_kinds: Iterable[int] = (1,),
        places_of_windows: Iterable[array[int]] = (),
    ) -> None:
        """Begin with nothing kept.

        Args:
            page_size: tokens per page
            config: how many levels, and what is shared in any case
            costs: what segments cost
            root: of the prefix tree
            kinds: the window of each attention kind, the kind that reads most first; None reads all earlier tokens
            layers_of_kinds: how many layers are of each kind
            places_of_windows: for each kind with a window the places of pages in its pool, which the scheduler
                changes; empty where all kinds have one pool
        """
        self._page_size = page_size
        self._max_shared_levels = config.max_shared_levels
        self._min_tokens = config.shared_prefix_len
        self._costs = costs if config.shared_prefix_len is None else TokensRead()
        self._reach, *_ = kinds = tuple(kinds)
        """What the first kind reads"""
        self._balancer: LevelBalancer | None = None
        if self._reach is None and isinstance(costs, CostModel) and costs.is_tiled and costs.costs.measured:
            self._balancer = LevelBalancer(costs, page_size, self._max_shared_levels)
        windows = [window_len for window_len in kinds if window_len is not None]
        places_of_kinds: list[array[int] | None] = [*places_of_windows] or [None] * len(windows)
        self._windows = [
            WindowPlanner(page_size, window_len, self._costs, places)
            for window_len, places in zip(windows, places_of_kinds, strict=True)
        ]
        self._layers_of_kinds = tuple(layers_of_kinds)
        self._root = root
        self._layout: _Layout | None = None
        self._last: PlannedCascade | None = None

    def plan(self, rows: list[PlannedRows]) -> PlannedCascade:
        """The cascade plan of a step. `rows`: each scheduled sequence once, its new pages in its table already."""
        layout = self._kept_layout(rows)
        placement = layout.placement
        kv_len = sum([row.start_len + row.num_new for row in rows])
        if self._reach is None:
            leaf = leaf_columns(placement.order, placement.prefix_pages, rows, self._page_size)
            plans, kv_lens = [CascadePlan((*layout.levels, leaf), self._page_size)], [kv_len]
            leaf_rows = leaf.qo_indptr, leaf.kv_last_page_len
        else:
            plans, kv_lens, leaf_rows = [], [], leaf_row_columns(placement.order, rows, self._page_size)
        for window in self._windows:
            plans.append(window.plan(placement, rows, *leaf_rows))
            kv_lens.append(kv_len - window.unread_len(rows))
        return self._planned(layout, plans, kv_lens)

    def plan_next(self, new_pages: list[tuple[int, int]]) -> PlannedCascade:
        """The plan after the last one, when each of its sequences goes on by one token and shares what it shared.

        Shared levels, and columns of the leaf that are as before, are the same objects. Not for more steps in turn than
        `num_steps_left` said.

        Args:
            new_pages: (leaf segment, page id) of the sequences whose token is the first of a page, in order
        """
        layout, last = self._layout, self._last
        assert layout is not None
        assert last is not None
        lens = [length + 1 for length in last.plans[0].leaf.kv_last_page_len]
        for segment, _ in new_pages:
            lens[segment] = 1
        last_page_len, num_more = int_column(lens), len(lens)
        pages_of_kinds = [] if self._reach is not None else [new_pages]
        pages_of_kinds += [window.placed(new_pages) for window in self._windows]
        plans = [_next_plan(*each, last_page_len) for each in zip(last.plans, pages_of_kinds, strict=True)]
        return self._planned(layout, plans, [kv_len + num_more for kv_len in last.kv_lens])

    def num_steps_left(self, positions: Iterable[int]) -> int:
        """How many decode steps in turn may follow the last plan. `positions`: of its rows, one per sequence."""
        if not self._windows:
            return sys.maxsize
        assert self._last is not None
        kv_lens = [position + 1 for position in positions]
        return min([window.num_steps_left(self._last.order, kv_lens) for window in self._windows])

    def _planned(self, layout: _Layout, plans: list[CascadePlan], kv_lens: list[int]) -> PlannedCascade:
        if self._windows:
            report = self._report_of_kinds(layout, kv_lens)
        else:
            (kv_len,), shared = kv_lens, layout.report
            report = replace(shared, kv_tokens_one_level=kv_len, kv_tokens_read=kv_len - shared.kv_tokens_saved)
        self._last = PlannedCascade(tuple(plans), layout.placement.order, report, kv_lens)
        return self._last

    def _report_of_kinds(self, layout: _Layout, kv_lens: list[int]) -> CascadeReport:
        """The groups of the first kind, and the tokens of all, by their layers."""
        reports = [layout.report] if self._reach is None else []
        reports += [shared_report(window.segments, layout.reason, self._page_size) for window in self._windows]
        read = [kv_len - shared.kv_tokens_saved for kv_len, shared in zip(kv_lens, reports, strict=True)]
        num_layers = sum(self._layers_of_kinds)
        return replace(
            reports[0],
            kv_tokens_one_level=sum(map(mul, self._layers_of_kinds, kv_lens)) // num_layers,
            kv_tokens_read=sum(map(mul, self._layers_of_kinds, read)) // num_layers,
        )

    def _kept_layout(self, rows: list[PlannedRows]) -> _Layout:
        """The layout of the last step where nothing that it depends on has changed, else a new one."""
        sequences = [row.sequence for row in rows]
        nodes = attach_nodes(rows, self._page_size)
        num_new = [row.num_new for row in rows]
        first_page = 0 if self._reach is None else self._first_page(rows, self._reach)
        kept, about = self._layout, (num_new, first_page)
        if kept and kept.sequences == sequences and kept.nodes == nodes and (kept.num_new, kept.first_page) == about:
            return kept
        placement, reason = self._place(rows, nodes, num_new, first_page)
        tables, levels = [sequence.pages for sequence in sequences], list[CascadeLevel]()
        for segments in placement.levels if self._reach is None else ():
            above = levels[-1].qo_indptr.tolist() if levels else []
            levels.append(level_columns(segments, above, sum(num_new), tables, self._page_size))
        report = shared_report(placement.levels, reason, self._page_size)
        self._layout = _Layout(sequences, nodes, num_new, first_page, placement, tuple(levels), report, reason)
        return self._layout

    def _first_page(self, rows: list[PlannedRows], window_len: int) -> int:
        """The first page that any sequence reads, rounded down so that it changes seldom."""
        first = first_read_page(min([row.start_len for row in rows]), window_len, self._page_size)
        stride = max(1, window_len // self._page_size // STRIDES_PER_WINDOW)
        return first - first % stride

    def _place(
        self, rows: list[PlannedRows], nodes: list[RadixNode], num_new: list[int], first_page: int
    ) -> tuple[Placement, str | None]:
        """The segments of the levels above the leaf, and the reason why none of them is shared."""
        plain = Placement(list(range(len(rows))), [], [0] * len(rows))
        if not self._max_shared_levels:
            return plain, "cascade attention is off"
        if len(nodes) == 1:
            return plain, "one sequence"
        forest = shared_forest(nodes, num_new, self._root)
        if first_page:
            forest = without_pages_before(forest, first_page)
        kv_lens = [row.start_len + row.num_new - first_page * self._page_size for row in rows]
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


def _tokens_in_common(forest: Run, page_size: int) -> tuple[int, int]:
    """Different tokens that at least two sequences read, and how often these are read again in a one-level plan."""
    runs = [(run.end - run.start, run.num_sequences) for run in preorder(forest)]
    common, read = sum([pages for pages, _ in runs]), sum([pages * readers for pages, readers in runs])
    return page_size * common, page_size * (read - common)


def _next_plan(plan: CascadePlan, new_pages: list[tuple[int, int]], last_page_len: IntColumn) -> CascadePlan:
    """A plan with a token more in each leaf segment."""
    leaf = plan.leaf
    page_indptr, page_indices = leaf.kv_page_indptr, leaf.kv_page_indices
    if new_pages:
        page_indptr, page_indices = _with_pages(leaf, new_pages)
    leaf = CascadeLevel(leaf.qo_indptr, page_indptr, page_indices, last_page_len)
    return CascadePlan((*plan.shared_levels, leaf), plan.page_size, plan.window_len)


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
