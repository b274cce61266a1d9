"""The plans of attention kinds with a window, which read the last so many tokens and no more.

A window masks the leaf alone, counted from the leaf's end. So what a sequence meets has to be one stretch that ends at
its last token, and what is shared has to lie inside every row's window. Both hold for a sequence that is not longer
than the window: it shares what was chosen for the kind that reads everything. Any other reads its last pages by itself.
"""

from __future__ import annotations

from itertools import accumulate

from cascade_llm.plan import CascadeLevel, CascadePlan
from cascade_llm.scheduler.cascade.layout import Placement, Segment, leaf_columns, level_columns
from cascade_llm.scheduler.cascade.tree import PlannedRows

__all__ = ["WindowPlanner"]


class WindowPlanner:
    """Plans one kind; its shared levels last while the placement does and no sequence outgrows the window."""

    def __init__(self, page_size: int, window_len: int) -> None:
        self._page_size, self._window_len = page_size, window_len
        self._placement: Placement | None = None
        self._fits: list[bool] = []
        self._levels: tuple[CascadeLevel, ...] = ()
        self._prefix_pages: list[int] = []

    def plan(self, placement: Placement, rows: list[PlannedRows]) -> CascadePlan:
        """The plan of a step.

        Args:
            placement: of the kind that reads everything; the same object while that is unchanged
            rows: each scheduled sequence once, as in the placement
        """
        fits = [row.start_len + row.num_new <= self._window_len for row in rows]
        if placement is not self._placement or fits != self._fits:
            self._placement, self._fits = placement, fits
            self._place(placement, rows)
        first_pages = [
            pages if fit else max(0, row.start_len - self._window_len + 1) // self._page_size
            for pages, fit, row in zip(self._prefix_pages, fits, rows, strict=True)
        ]
        leaf = leaf_columns(placement.order, first_pages, rows, self._page_size)
        return CascadePlan((*self._levels, leaf), self._page_size, self._window_len)

    def _place(self, placement: Placement, rows: list[PlannedRows]) -> None:
        """Keep the segments whose sequences all fit the window; one longer than it drops every segment above it too."""
        order, levels = placement.order, list[CascadeLevel]()
        first_rows = accumulate([rows[i].num_new for i in order], initial=0)
        places = {row: place for place, row in enumerate(first_rows)}
        self._prefix_pages = [0] * len(rows)
        for segments in placement.levels:
            kept: list[Segment] = []
            for segment in segments:
                place = places[segment.first_row]
                members = order[place : place + segment.num_sequences]
                if all(self._fits[i] for i in members):
                    kept.append(segment._replace(start_page=self._prefix_pages[members[0]]))
                    for i in members:
                        self._prefix_pages[i] = segment.end_page
            if kept:
                above = levels[-1].qo_indptr.tolist() if levels else []
                tables = [row.sequence.pages for row in rows]
                levels.append(level_columns(kept, above, sum([row.num_new for row in rows]), tables, self._page_size))
        self._levels = tuple(levels)
