"""A step: while it is being decided, as the columns that it becomes, and in flight."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

from cascade_llm.config import SchedulerConfig
from cascade_llm.plan import IntColumn, LaneStart, PageCopy, StepPlan, int_column
from cascade_llm.scheduler.cascade.planner import PlannedCascade
from cascade_llm.scheduler.cascade.tree import PlannedRows
from cascade_llm.scheduler.pages import PageTables
from cascade_llm.scheduler.sequence import Sequence

__all__ = ["InFlightStep", "StepDraft", "build_step_plan", "is_decode"]


@dataclass(slots=True)
class StepDraft:
    """The decisions of one call of `schedule`."""

    budget: int
    rows: list[PlannedRows] = field(default_factory=list)
    lane_starts: list[LaneStart] = field(default_factory=list)
    page_copies: list[PageCopy] = field(default_factory=list)
    short_of_pages: bool = False
    """Whether a running sequence found no room: then nobody is admitted."""
    reports_prompts: bool = False
    """Whether log-probabilities of prompt tokens may be asked for."""


def build_step_plan(
    step_id: int,
    draft: StepDraft,
    rows: list[PlannedRows],
    cascade: PlannedCascade,
    config: SchedulerConfig,
    tables: PageTables,
) -> StepPlan:
    """Write the columns over `rows`, which are the draft's in the order of the cascade plan."""
    return StepPlan(
        step_id=step_id,
        cascades=cascade.plans,
        layer_kinds=config.layer_kinds,
        sequence_lanes=int_column([row.sequence.lane for row in rows]),
        sequence_epochs=int_column([row.sequence.epoch for row in rows]),
        **_row_columns(rows, config.page_size),
        window_slots=tuple(_slots_in(rows, pool.places, config.page_size) for pool in tables.window_pools),
        **_sample_columns(rows),
        **(_prompt_logprob_columns(rows) if draft.reports_prompts else {}),
        lane_starts=tuple(draft.lane_starts),
        page_copies=tuple(draft.page_copies),
        report=cascade.report,
    )


def _row_columns(rows: list[PlannedRows], page_size: int) -> dict[str, Any]:
    """Each row's token, where it stands and where its K/V go; and which tokens are on the device."""
    token_ids, positions, slots = array("i"), array("i"), array("i")
    lane_rows, lane_row_lanes = array("i"), array("i")
    for sequence, start, num_new, _, drafts in rows:
        end = start + num_new
        if num_new == 1:
            positions.append(start)
            slots.append(sequence.pages[start // page_size] * page_size + start % page_size)
        else:
            positions.extend(range(start, end))
            _extend_slots(slots, sequence.pages, start, end, page_size)
        token_ids.extend(sequence.token_ids[start:end])
        if drafts:
            token_ids.extend(drafts)
        if len(token_ids) < len(positions):  # its last token is drawn by a step in flight
            lane_rows.append(len(token_ids))
            lane_row_lanes.append(sequence.lane)
            token_ids.append(0)
    return {
        "token_ids": int_column(token_ids),
        "positions": int_column(positions),
        "slots": int_column(slots),
        "lane_rows": int_column(lane_rows),
        "lane_row_lanes": int_column(lane_row_lanes),
    }


def _sample_columns(rows: list[PlannedRows]) -> dict[str, Any]:
    """Which rows are drawn from, for whom, under which mask; a draft's rows, and its last for the sequence itself."""
    sample_rows, sample_lanes, sample_positions = array("i"), array("i"), array("i")
    draft_samples, draft_lens, masks = array("i"), array("i"), dict[int, IntColumn]()
    num_rows = 0
    for sequence, start, num_new, samples, drafts in rows:
        num_rows, end = num_rows + num_new, start + num_new
        if drafts:
            draft_samples.append(len(sample_rows))
            draft_lens.append(len(drafts))
            sample_rows.extend(range(num_rows - len(drafts) - 1, num_rows - 1))
            sample_lanes.extend([sequence.lane] * len(drafts))
            sample_positions.extend(range(end - len(drafts), end))
        for sampled in samples:
            if sampled.mask is not None:
                masks[len(sample_rows)] = sampled.mask
            sample_rows.append(num_rows - 1)
            sample_lanes.append(sampled.lane)
            sample_positions.append(end)
    return {
        **_mask_columns(masks, len(sample_rows)),
        "sample_rows": int_column(sample_rows),
        "sample_lanes": int_column(sample_lanes),
        "sample_positions": int_column(sample_positions),
        "draft_samples": int_column(draft_samples),
        "draft_lens": int_column(draft_lens),
    }


def _prompt_logprob_columns(rows: list[PlannedRows]) -> dict[str, Any]:
    """Rows of prompts whose log-probabilities were asked for, as far as these have not been reported."""
    logprob_rows, token_ids, counts = array("i"), array("i"), array("i")
    num_rows = 0
    for sequence, start, num_new, *_ in rows:
        num_rows, end = num_rows + num_new, start + num_new
        if start < sequence.prompt_len and sequence.reports_prompt:
            for position in range(max(start, sequence.num_prompt_logprobs), min(end, sequence.prompt_len - 1)):
                logprob_rows.append(num_rows - end + position)
                token_ids.append(sequence.token_ids[position + 1])
                counts.append(sequence.request.params.prompt_logprobs or 0)
    return {
        "prompt_logprob_rows": int_column(logprob_rows),
        "prompt_logprob_token_ids": int_column(token_ids),
        "prompt_logprob_counts": int_column(counts),
    }


def _mask_columns(masks: dict[int, IntColumn], num_samples: int) -> dict[str, Any]:
    """A mask of several samples stands once. `masks`: by sample, of those that have one."""
    if not masks:
        return {}
    table = {id(mask): mask for mask in masks.values()}
    positions = {key: position for position, key in enumerate(table)}
    rows = [positions[id(masks[sample])] if sample in masks else -1 for sample in range(num_samples)]
    return {"sample_mask_rows": int_column(rows), "token_bitmasks": tuple(table.values())}


def _slots_in(rows: list[PlannedRows], places: array[int], page_size: int) -> IntColumn:
    """Where each row's K/V go in the pool that has the pages at these places."""
    slots = array("i")
    for sequence, start, num_new, _, _ in rows:
        first, end = start // page_size, -(-(start + num_new) // page_size)
        own = array("i", [places[page] for page in sequence.pages[first:end]])
        skipped = first * page_size
        _extend_slots(slots, own, start - skipped, start + num_new - skipped, page_size)
    return int_column(slots)


def _extend_slots(slots: array[int], pages: array[int], start: int, end: int, page_size: int) -> None:
    for page in range(start // page_size, -(-end // page_size)):
        first = pages[page] * page_size
        begin, stop = max(start - page * page_size, 0), min(end - page * page_size, page_size)
        slots.extend(range(first + begin, first + stop))


@dataclass(frozen=True, slots=True)
class InFlightStep:
    """A step that was planned and not committed."""

    plan: StepPlan
    sequences: list[Sequence]
    """In the order of the plan's leaf segments."""
    version: int
    """Of the prefix cache, when it was planned: while it is the same, all its sequences run on."""
    mixed_rows: list[PlannedRows] | None = None
    """In the same order; None for a decode step, where each sequence has one row and one sample."""

    def rows(self) -> list[PlannedRows]:
        """What each sequence computes."""
        if self.mixed_rows is not None:
            return self.mixed_rows
        positions = self.plan.positions
        return [PlannedRows(s, start, 1, (s,)) for s, start in zip(self.sequences, positions, strict=True)]


def is_decode(rows: list[PlannedRows]) -> bool:
    """Whether every sequence computes one row, behind its prompt, and draws one token."""
    return all(
        num_new == 1 and start_len >= sequence.prompt_len and samples  # else it recomputes, after a preemption
        for sequence, start_len, num_new, samples, _ in rows
    )
