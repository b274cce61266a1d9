"""Decode steps that follow each other, each made from the one before.

While nobody comes, goes or begins to share more, a decode step differs from the last one in little: every position is
one larger, and some sequences begin a page. So nothing is decided again: a few operations on whole columns make the
next plan, and only the sequences that begin a page are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from functools import cached_property

from cascade_llm.plan import EMPTY, StepPlan, int_column
from cascade_llm.scheduler.cascade.planner import CascadePlanner
from cascade_llm.scheduler.cascade.tree import PlannedRows
from cascade_llm.scheduler.page_tables import PageTables
from cascade_llm.scheduler.sequence import Sequence

__all__ = ["DecodeRun", "InFlightStep", "is_decode"]


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A step that was planned and not committed."""

    plan: StepPlan
    sequences: list[Sequence]
    """In the order of the plan's leaf segments."""
    version: int
    """Of the prefix cache, when it was planned: while it is the same, all its sequences run on."""
    mixed_rows: Rows[PlannedRows] | None = None
    """In the same order; None for a decode step, where each sequence has one row and one sample."""

    def rows(self) -> Rows[PlannedRows]:
        """What each sequence computes."""
        if self.mixed_rows is not None:
            return self.mixed_rows
        positions = self.plan.positions
        return [PlannedRows(s, start, 1, (s,)) for s, start in zip(self.sequences, positions, strict=True)]


def is_decode(rows: Rows[PlannedRows]) -> bool:
    """Whether every sequence computes one row, behind its prompt, and draws one token."""
    return all(num_new == 1 and start_len >= sequence.prompt_len for sequence, start_len, num_new, _ in rows)


class DecodeRun:
    """Continues a decode step of all running sequences."""

    def __init__(self, first: InFlightStep, tables: PageTables, planner: CascadePlanner) -> None:
        """`first`: the last step that was planned."""
        self._last = first
        self._tables, self._planner = tables, planner
        self._num_steps = 0

    def next_step(self, step_id: int) -> InFlightStep | None:
        """The next decode step; None, with nothing changed, where it has to be decided anew.

        That is where the prefix cache has another version, a sequence is at its end, or pages are short.
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

    def _next_plan(self, step_id: int, begin_page: Rows[int], pages: Rows[int]) -> StepPlan:
        last, sequences, size = self._last.plan, self._last.sequences, self._tables.page_size
        cascade = self._planner.plan_next(list(zip(begin_page, pages, strict=True)))
        slots = [slot + 1 for slot in last.slots]
        for row, page in zip(begin_page, pages, strict=True):
            slots[row] = page * size
        on_device = sequences[0].num_unresolved > 0  # the last tokens are drawn by a step in flight
        tokens = [0] * len(sequences) if on_device else [sequence.token_ids[-1] for sequence in sequences]
        return StepPlan(
            step_id=step_id,
            cascades=(cascade.plan,),
            token_ids=int_column(tokens),
            positions=last.sample_positions,
            slots=int_column(slots),
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
        """Steps until the first sequence has all the tokens that it may have."""
        return min([sequence.max_len - sequence.total_len for sequence in self._last.sequences])

    @cached_property
    def _rows_by_place(self) -> list[list[int]]:
        """The rows of the first step, by their place in their page."""
        size = self._tables.page_size
        rows: list[list[int]] = [[] for _ in range(size)]
        for row, position in enumerate(self._last.plan.positions):
            rows[position % size].append(row)
        return rows
