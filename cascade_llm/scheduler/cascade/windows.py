"""The plans of attention kinds with a window, which read the last so many tokens and no more.

A shared segment has no mask, so it is shared as far as it lies inside the window of every row in it. What a window cuts
is read by each sequence's leaf, where the mask is:

    pages of A    0 1 2 3 4 5 6 7 8 9     A and B have the pages 0 to 7 in common; A is ahead, its window begins in 3
    pages of B    0 1 2 3 4 5 6 7 10      the window of B begins in 2
    shared                4 5 6 7
    leaf of A           3         8 9
    leaf of B         2 3         10

So a windowed kind shares what was chosen for all kinds, cut at its start (`Placement`), where that still pays. The
window moves with every token; a segment is cut a page further than it must be, so that it lasts for a page of decode
steps.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import accumulate, groupby

from cascade_llm.plan import CascadeLevel, CascadePlan, IntColumn, int_column
from cascade_llm.scheduler.cascade.choice import SegmentCosts
from cascade_llm.scheduler.cascade.layout import Placement, Segment, level_columns
from cascade_llm.scheduler.cascade.tree import PlannedRows

__all__ = ["WindowPlanner", "first_read_page"]

MOST_ROWS = 256
"""Of a sequence that the window cuts and that shares all the same: some kernels have no mask per segment and read the
cut pages row by row. A step with so many rows of one sequence computes them for longer than it reads."""


class WindowPlanner:
    """Plans one kind; its shared levels last while the placement does and every segment is inside the windows."""

    def __init__(self, page_size: int, window_len: int, costs: SegmentCosts, places: array[int] | None = None) -> None:
        """Begin with nothing kept.

        Args:
            page_size: tokens per page
            window_len: what the kind reads
            costs: what segments cost, and so whether what a window leaves of one is still worth sharing
            places: of the pages in the kind's own pool; None where it has none
        """
        self.window_len, self._costs, self._places = window_len, costs, places
        self._page_size = page_size
        self._placement: Placement | None = None
        self.segments: list[list[Segment]] = []
        """Of the shared levels of the last plan."""
        self._levels: tuple[CascadeLevel, ...] = ()
        self._holes: list[range] = []
        """[sequences] the pages that shared segments cover"""
        self._max_lens: list[int] = []
        """[sequences] tokens that each may have before the levels have to be cut anew"""

    def plan(
        self, placement: Placement, rows: list[PlannedRows], qo_indptr: IntColumn, kv_last_page_len: IntColumn
    ) -> CascadePlan:
        """The plan of a step.

        Args:
            placement: of all kinds; the same object while that is unchanged
            rows: each scheduled sequence once, as in the placement
            qo_indptr, kv_last_page_len: of the leaf, the same in all kinds
        """
        lens = [row.start_len + row.num_new for row in rows]
        if placement is not self._placement or any(map(int.__gt__, lens, self._max_lens)):
            self._placement = placement
            self._place(placement, rows, lens)
        page_indptr, indices = array("i", [0]), array("i")
        for i in placement.order:
            sequence, start_len, _, _, _ = rows[i]
            hole, first = self._holes[i], first_read_page(start_len, self.window_len, self._page_size)
            end = -(-lens[i] // self._page_size)
            if hole:
                indices.extend(sequence.pages[first : hole.start])
                indices.extend(sequence.pages[hole.stop : end])
            else:
                indices.extend(sequence.pages[first:end])
            page_indptr.append(len(indices))
        leaf = CascadeLevel(qo_indptr, int_column(page_indptr), self._placed_column(indices), kv_last_page_len)
        return CascadePlan((*self._levels, leaf), self._page_size, self.window_len)

    def placed(self, new_pages: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """(leaf segment, page) with the page's place in the kind's pool."""
        places = self._places
        return new_pages if places is None else [(segment, places[page]) for segment, page in new_pages]

    def _placed_column(self, pages: Iterable[int]) -> IntColumn:
        """The places of pages in the kind's pool."""
        return int_column(pages if self._places is None else map(self._places.__getitem__, pages))

    def unread_len(self, rows: list[PlannedRows]) -> int:
        """Tokens of all sequences that lie in pages which no row of theirs reaches."""
        firsts = [first_read_page(row.start_len, self.window_len, self._page_size) for row in rows]
        return self._page_size * sum(firsts)

    def num_steps_left(self, order: list[int], kv_lens: list[int]) -> int:
        """Decode steps for which the levels last, and for which the leaf's first pages may stay though no window
        reaches them.

        Args:
            order: of the placement
            kv_lens: tokens of the last plan's sequences, in that order
        """
        left = min([self._max_lens[i] - kv_len for i, kv_len in zip(order, kv_lens, strict=True)])
        return min(left, self._page_size) if max(kv_lens) + self._page_size > self.window_len else left

    def _place(self, placement: Placement, rows: list[PlannedRows], lens: list[int]) -> None:
        """Cut the segments of a placement; those of which nothing is left go, and what is below them begins earlier."""
        order, size = placement.order, self._page_size
        levels, self.segments = list[CascadeLevel](), []
        first_rows = list(accumulate([rows[i].num_new for i in order], initial=0))
        places = {row: place for place, row in enumerate(first_rows)}
        first_inside = list(map(self._first_inside, rows, lens))
        holes = [range(0)] * len(rows)
        max_lens = [row.sequence.max_len for row in rows]
        for segments in placement.levels:
            kept: list[tuple[Segment, list[int]]] = []
            gain_s = -self._costs.level_s(first_rows[-1])
            for segment in segments:
                place = places[segment.first_row]
                members = order[place : place + segment.num_sequences]
                for part in _parts_inside(segment, members, holes, first_inside):
                    sharers = members[part.start : part.stop]
                    start = holes[sharers[0]].stop or max([first_inside[i] or 0 for i in sharers])
                    rows_of = first_rows[place + part.start], first_rows[place + part.stop]
                    cut = Segment(*rows_of, start, segment.end_page, sharers[0], len(sharers))
                    segment_gain_s = self._gain_s(cut, [rows[i].num_new for i in sharers])
                    if segment_gain_s > 0:
                        kept.append((cut, sharers))
                        gain_s += segment_gain_s
            if gain_s <= 0:
                continue
            for cut, sharers in kept:
                for i in sharers:
                    holes[i] = range(holes[i].start if holes[i] else cut.start_page, cut.end_page)
                    max_lens[i] = min(max_lens[i], holes[i].start * size + self.window_len)
            self.segments.append([cut for cut, _ in kept])
            above = levels[-1].qo_indptr.tolist() if levels else []
            tables = [row.sequence.pages for row in rows]
            level = level_columns(self.segments[-1], above, first_rows[-1], tables, size)
            if self._places is not None:
                level = replace(level, kv_page_indices=self._placed_column(level.kv_page_indices))
            levels.append(level)
        self._levels, self._holes, self._max_lens = tuple(levels), holes, max_lens

    def _gain_s(self, segment: Segment, num_new: list[int]) -> float:
        """What is gained where sequences of so many rows read a segment together."""
        tokens, costs = segment.num_pages * self._page_size, self._costs
        alone_s = sum([costs.leaf_tokens_s(tokens, rows) for rows in num_new])
        return alone_s - costs.shared_segment_s(tokens, sum(num_new))

    def _first_inside(self, row: PlannedRows, kv_len: int) -> int | None:
        """The first page that is inside the windows of all rows of a sequence, and will be for a page of steps; None
        where it shares nothing."""
        if kv_len <= self.window_len:
            return 0
        if row.num_new > MOST_ROWS:
            return None
        return -(-(kv_len + self._page_size - self.window_len) // self._page_size)


def _parts_inside(
    segment: Segment, members: list[int], holes: list[range], first_inside: list[int | None]
) -> Iterator[range]:
    """The neighbours among a segment's sequences that share its end, and the same pages above it: ranges of `members`.

    A sequence whose window has left the segment behind parts those before it from those after it.
    """

    def kind(place: int) -> tuple[int, bool]:
        first = first_inside[members[place]]
        return holes[members[place]].stop, first is not None and first < segment.end_page

    for (_, is_inside), group in groupby(range(len(members)), kind):
        places = list(group)
        if is_inside and len(places) > 1:
            yield range(places[0], places[-1] + 1)


def first_read_page(start_len: int, window_len: int, page_size: int) -> int:
    """The first page that a window reaches from the row at position `start_len`."""
    return max(0, start_len + 1 - window_len) // page_size
