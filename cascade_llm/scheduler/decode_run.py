"""One decode step after another.

While nobody comes, goes or begins to share more, a decode step differs from the last one in little: every position is
one larger, and some sequences begin a page. So nothing is decided again: a few operations on whole columns make the
next plan, and only the sequences that begin a page are looked at one by one.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import cached_property

from cascade_llm.plan import EMPTY, IntColumn, StepPlan, int_column
from cascade_llm.scheduler.cascade.planner import CascadePlanner
from cascade_llm.scheduler.pages import PageTables
from cascade_llm.scheduler.step import InFlightStep

__all__ = ["DecodeRun"]


def _slots_after(slots: IntColumn, begin_page: list[int], places: Iterable[int], page_size: int) -> IntColumn:
    """The slots of the next step. `places`: of the pages that the rows `begin_page` begin."""
    following = [slot + 1 for slot in slots]
    for row, place in zip(begin_page, places, strict=True):
        following[row] = place * page_size
    return int_column(following)


class DecodeRun:
    """Continues a decode step of all running sequences."""

    def __init__(self, first: InFlightStep, tables: PageTables, planner: CascadePlanner) -> None:
        """`first`: the last step that was planned."""
        self._last = first
        self._tables, self._planner = tables, planner
        self._num_steps = 0

    def next_step(self, step_id: int) -> InFlightStep | None:
        """The next decode step; None, with nothing changed, where it has to be decided anew.

        That is where the prefix cache has another version, a sequence is at its end, pages are short, or windows have
        moved on.
        """
        last, size = self._last, self._tables.page_size
        if last.version != self._tables.cache.version or self._num_steps == self._max_steps:
            return None
        begin_page = self._rows_by_place[-(self._num_steps + 1) % size]
        pages = self._tables.extend([last.sequences[row] for row in begin_page])
        if pages is None:
            return None
        self._num_steps += 1
        self._last = InFlightStep(self._next_plan(step_id, begin_page, pages), last.sequences, last.version)
        for sequence in last.sequences:
            sequence.planned_len += 1
            sequence.num_unresolved += 1
        return self._last

    def _next_plan(self, step_id: int, begin_page: list[int], pages: array[int]) -> StepPlan:
        last, sequences, size = self._last.plan, self._last.sequences, self._tables.page_size
        cascade = self._planner.plan_next(list(zip(begin_page, pages, strict=True)))
        slots = _slots_after(last.slots, begin_page, pages, size)
        window_slots = tuple(
            _slots_after(column, begin_page, [pool.places[page] for page in pages], size)
            for column, pool in zip(last.window_slots, self._tables.window_pools, strict=True)
        )
        on_device = sequences[0].num_unresolved > 0  # the last tokens are drawn by a step in flight
        tokens = [0] * len(sequences) if on_device else [sequence.token_ids[-1] for sequence in sequences]
        return StepPlan(
            step_id=step_id,
            cascades=cascade.plans,
            layer_kinds=last.layer_kinds,
            token_ids=int_column(tokens),
            positions=last.sample_positions,
            slots=slots,
            window_slots=window_slots,
            lane_rows=last.sample_rows if on_device else EMPTY,
            lane_row_lanes=last.sequence_lanes if on_device else EMPTY,
            sequence_lanes=last.sequence_lanes,
            sequence_epochs=last.sequence_epochs,
            sample_rows=last.sample_rows,
            sample_lanes=last.sample_lanes,
            sample_positions=int_column([position + 1 for position in last.sample_positions]),
            report=cascade.report,
        )

    @cached_property
    def _max_steps(self) -> int:
        """Steps until the first sequence has all the tokens that it may have, or what is shared has to be cut anew."""
        left = min([sequence.max_len - sequence.total_len for sequence in self._last.sequences])
        return min(left, self._planner.num_steps_left(self._last.plan.positions))

    @cached_property
    def _rows_by_place(self) -> list[list[int]]:
        """The rows of the first step, by their place in their page."""
        size = self._tables.page_size
        rows: list[list[int]] = [[] for _ in range(size)]
        for row, position in enumerate(self._last.plan.positions):
            rows[position % size].append(row)
        return rows
