"""The shape of a plan that outlives a step: the order of rows and the shared levels."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from cascade_llm.plan import CascadeLevel, CascadeReport, IntColumn, int_column
from cascade_llm.scheduler.cascade.choice import SegmentChoice
from cascade_llm.scheduler.cascade.tree import PlannedRows, Run

__all__ = [
    "Placement",
    "Segment",
    "leaf_columns",
    "leaf_row_columns",
    "level_columns",
    "place_segments",
    "shared_report",
]


class Segment(NamedTuple):
    """A chosen run with its place in the order of rows."""

    first_row: int
    last_row: int
    start_page: int
    end_page: int
    sequence: int
    """One of the sequences below it: its table has the pages."""
    num_sequences: int

    @property
    def num_pages(self) -> int:
        """Pages that the segment reads."""
        return self.end_page - self.start_page


class Placement(NamedTuple):
    """A choice of segments, laid out."""

    order: list[int]
    """The sequences of the step, depth first."""
    levels: list[list[Segment]]
    """The segments of each shared level, coarsest first, in the order of rows."""
    prefix_pages: list[int]
    """For each sequence of the step the pages that shared levels cover."""


def place_segments(
    forest: Run, choice: SegmentChoice, num_new: Sequence[int], levels_of: Mapping[Run, int]
) -> Placement:
    """Order the sequences depth first and place each chosen run in that order, at its level in `levels_of`.

    Below each chosen run those with a further segment come first, and of these the ones on the next level, so that rows
    with nothing more to share are neighbours and sit in one empty segment.
    """
    order: list[int] = []
    spans: list[list[tuple[Run, int, int]]] = [[] for _ in range(max(levels_of.values(), default=-1) + 1)]

    def place_below(run: Run) -> None:
        chosen, others = _parts_below(run, choice)
        for child in sorted(chosen, key=levels_of.__getitem__):
            start = len(order)
            place_below(child)
            spans[levels_of[child]].append((child, start, len(order)))
        order.extend(sorted(others))

    place_below(forest)
    first_rows = list(accumulate((num_new[i] for i in order), initial=0))
    prefix_pages = [0] * len(num_new)
    levels: list[list[Segment]] = [[] for _ in spans]
    for level, level_spans in zip(levels, spans, strict=True):
        for run, start, end in level_spans:
            level.append(
                Segment(first_rows[start], first_rows[end], choice.start_pages[run], run.end, order[start], end - start)
            )
            for index in order[start:end]:
                prefix_pages[index] = run.end
    return Placement(order, levels, prefix_pages)


def level_columns(
    segments: Sequence[Segment], above: Sequence[int], num_rows: int, tables: Sequence[array[int]], page_size: int
) -> CascadeLevel:
    """Write one shared level down, with empty segments for the rows that have none.

    Args:
        segments: the level's segments in the order of rows
        above: sorted row boundaries of the level above, which this level must keep (refinement)
        num_rows: rows of the step
        tables: the page table of each sequence of the step
    """
    qo_indptr, page_indptr = array("i", [0]), array("i", [0])
    indices, last_page_len = array("i"), array("i")

    def end_segment(row: int, pages: array[int]) -> None:
        qo_indptr.append(row)
        indices.extend(pages)
        page_indptr.append(len(indices))
        last_page_len.append(page_size if pages else 0)

    def skip_to(row: int) -> None:
        here = qo_indptr[-1]
        if here < row:
            for boundary in above[bisect_right(above, here) : bisect_left(above, row)]:
                end_segment(boundary, array("i"))
            end_segment(row, array("i"))

    for segment in segments:
        skip_to(segment.first_row)
        end_segment(segment.last_row, tables[segment.sequence][segment.start_page : segment.end_page])
    skip_to(num_rows)
    return CascadeLevel(int_column(qo_indptr), int_column(page_indptr), int_column(indices), int_column(last_page_len))


def leaf_row_columns(order: list[int], rows: list[PlannedRows], page_size: int) -> tuple[IntColumn, IntColumn]:
    """`qo_indptr` and `kv_last_page_len` of the leaf, which are the same in all attention kinds."""
    qo_indptr, last_page_len, num_rows = array("i", [0]), array("i"), 0
    for i in order:
        num_rows += rows[i].num_new
        qo_indptr.append(num_rows)
        last_page_len.append((rows[i].start_len + rows[i].num_new - 1) % page_size + 1)
    return int_column(qo_indptr), int_column(last_page_len)


def shared_report(levels: Sequence[Sequence[Segment]], reason: str | None, page_size: int) -> CascadeReport:
    """What segments share; token counts are of these alone. `reason`: why nothing was chosen, if nothing was."""
    groups = [segment for segments in levels for segment in segments if segment.num_sequences > 1]
    if not groups and reason is None:
        reason = "no shared run lies inside the windows"
    return CascadeReport(
        num_levels=len(levels) + 1,
        num_groups=len(groups),
        grouped_rows=_num_rows_in(groups),
        kv_tokens_read=page_size * sum(s.num_pages for s in groups),
        kv_tokens_one_level=page_size * sum(s.num_pages * s.num_sequences for s in groups),
        reason=reason,
    )


def _num_rows_in(segments: list[Segment]) -> int:
    """Rows in at least one of them."""
    rows = end = 0
    for segment in sorted(segments):
        rows += max(0, segment.last_row - max(end, segment.first_row))
        end = max(end, segment.last_row)
    return rows


def leaf_columns(order: list[int], first_pages: list[int], rows: list[PlannedRows], page_size: int) -> CascadeLevel:
    """Write the leaf down: one segment per sequence of `order`, with its pages from `first_pages` on."""
    qo_indptr, page_indptr = array("i", [0]), array("i", [0])
    indices, last_page_len = array("i"), array("i")
    num_rows = 0
    for i in order:
        sequence, start_len, num_new, _, _ = rows[i]
        end = start_len + num_new
        num_rows += num_new
        qo_indptr.append(num_rows)
        indices.extend(sequence.pages[first_pages[i] : -(-end // page_size)])
        page_indptr.append(len(indices))
        last_page_len.append((end - 1) % page_size + 1)
    return CascadeLevel(int_column(qo_indptr), int_column(page_indptr), int_column(indices), int_column(last_page_len))


def _parts_below(run: Run, choice: SegmentChoice) -> tuple[list[Run], list[int]]:
    """The nearest chosen runs below `run`, and the sequences below it that are in none of them."""
    chosen: list[Run] = []
    others = list(run.members)
    stack = run.children[::-1]
    while stack:
        current = stack.pop()
        if current in choice.start_pages:
            chosen.append(current)
        else:
            others.extend(current.members)
            stack.extend(reversed(current.children))
    return chosen, others
