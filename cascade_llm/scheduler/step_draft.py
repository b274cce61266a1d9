"""One step while it is being decided, and the columns that it becomes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from cascade_llm.plan import LaneStart, PageCopy, StepPlan, int_column
from cascade_llm.scheduler.cascade.planner import PlannedCascade
from cascade_llm.scheduler.cascade.tree import PlannedRows

__all__ = ["StepDraft", "build_step_plan"]


@dataclass(slots=True)
class StepDraft:
    """The decisions of one call of `schedule`."""

    budget: int
    rows: list[PlannedRows] = field(default_factory=list)
    lane_starts: list[LaneStart] = field(default_factory=list)
    page_copies: list[PageCopy] = field(default_factory=list)
    short_of_pages: bool = False
    """Whether a running sequence found no room: then nobody is admitted."""


def build_step_plan(
    step_id: int, draft: StepDraft, rows: Rows[PlannedRows], cascade: PlannedCascade, page_size: int
) -> StepPlan:
    """Write the columns over `rows`, which are the draft's in the order of the cascade plan."""
    token_ids, positions, slots = array("i"), array("i"), array("i")
    lane_rows, lane_row_lanes = array("i"), array("i")
    sample_rows, sample_lanes, sample_positions = array("i"), array("i"), array("i")
    logprob_rows, logprob_ids, logprob_counts = array("i"), array("i"), array("i")
    row = 0
    for sequence, start, num_new, samples in rows:
        end = start + num_new
        if num_new == 1:
            positions.append(start)
            slots.append(sequence.pages[start // page_size] * page_size + start % page_size)
        else:
            positions.extend(range(start, end))
            _extend_slots(slots, sequence.pages, start, end, page_size)
        token_ids.extend(sequence.token_ids[start:end])
        row += num_new
        if len(token_ids) < row:  # its last token is drawn by a step in flight
            token_ids.append(0)
            lane_rows.append(row - 1)
            lane_row_lanes.append(sequence.lane)
        for sampled in samples:
            sample_rows.append(row - 1)
            sample_lanes.append(sampled.lane)
            sample_positions.append(end)
        if start < sequence.prompt_len and sequence.reports_prompt:
            for position in range(max(start, sequence.num_prompt_logprobs), min(end, sequence.prompt_len - 1)):
                logprob_rows.append(row - end + position)
                logprob_ids.append(sequence.token_ids[position + 1])
                logprob_counts.append(sequence.request.params.prompt_logprobs or 0)
    return StepPlan(
        step_id=step_id,
        cascades=(cascade.plan,),
        token_ids=int_column(token_ids),
        positions=int_column(positions),
        slots=int_column(slots),
        lane_rows=int_column(lane_rows),
        lane_row_lanes=int_column(lane_row_lanes),
        sequence_lanes=int_column([row.sequence.lane for row in rows]),
        sequence_epochs=int_column([row.sequence.epoch for row in rows]),
        sample_rows=int_column(sample_rows),
        sample_lanes=int_column(sample_lanes),
        sample_positions=int_column(sample_positions),
        prompt_logprob_rows=int_column(logprob_rows),
        prompt_logprob_token_ids=int_column(logprob_ids),
        prompt_logprob_counts=int_column(logprob_counts),
        lane_starts=tuple(draft.lane_starts),
        page_copies=tuple(draft.page_copies),
        report=cascade.report,
    )


def _extend_slots(slots: array[int], pages: array[int], start: int, end: int, page_size: int) -> None:
    for page in range(start // page_size, -(-end // page_size)):
        first = pages[page] * page_size
        begin, stop = max(start - page * page_size, 0), min(end - page * page_size, page_size)
        slots.extend(range(first + begin, first + stop))
