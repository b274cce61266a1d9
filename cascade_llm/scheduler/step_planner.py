"""Decides what a step computes: how many rows each running sequence gets, and who is admitted beside them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

from cascade_llm.config import SchedulerConfig
from cascade_llm.metrics import SchedulerCounters
from cascade_llm.plan import PageCopy, StepPlan
from cascade_llm.scheduler.cascade.choice import SegmentCosts
from cascade_llm.scheduler.cascade.planner import CascadePlanner
from cascade_llm.scheduler.cascade.tree import PlannedRows
from cascade_llm.scheduler.decode_run import DecodeRun
from cascade_llm.scheduler.prefix_cache import PrefixMatch
from cascade_llm.scheduler.roster import Roster
from cascade_llm.scheduler.sequence import Sequence
from cascade_llm.scheduler.step import InFlightStep, StepDraft, build_step_plan, is_decode

__all__ = ["Drafter", "StepPlanner"]

Drafter = Callable[[Sequence, int], Iterable[int]]
"""Proposes the next tokens of a sequence, as many as it likes up to a number, and changes nothing."""


class StepPlanner:
    """Plans one step after another for the sequences of a roster, and moves their planned lengths on."""

    def __init__(
        self,
        config: SchedulerConfig,
        costs: SegmentCosts,
        roster: Roster,
        counters: SchedulerCounters,
        drafter: Drafter | None = None,
    ) -> None:
        """For the roster's pages as they are now: after a restart of it, make another planner."""
        self._config, self._roster, self._counters, self._drafter = config, roster, counters, drafter
        self._tables = roster.tables
        self._cascade = CascadePlanner(
            config.page_size,
            config.cascade,
            costs,
            self._tables.cache.root,
            config.attention_kinds,
            config.layers_of_kinds,
            [pool.places for pool in self._tables.window_pools],
        )
        self._most_rows = config.most_rows_of_sequence
        self._decode_run: DecodeRun | None = None
        self._draining = False  # a running sequence lacks pages: plan nothing until no step is in flight
        self._tier_copies: list[PageCopy] = []

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Have the next step that is planned carry copies between tiers."""
        self._tier_copies.extend(copies)

    def plan(self, step_id: int, num_in_flight: int) -> InFlightStep | None:
        """The next step; None when nothing can run before one of the `num_in_flight` steps is committed."""
        if self._draining and num_in_flight:
            return None
        self._draining = False
        self._tables.sessions.expire()
        return self._next_decode_step(step_id) or self._new_step(step_id, num_in_flight)

    def _next_decode_step(self, step_id: int) -> InFlightStep | None:
        """The last step, moved on by a token; None where anything is to be decided."""
        if (
            self._decode_run is None
            or self._tier_copies
            or self._next_admission(self._config.max_num_batched_tokens - len(self._roster.running)) is not None
        ):
            return None
        return self._decode_run.next_step(step_id)

    def _new_step(self, step_id: int, num_in_flight: int) -> InFlightStep | None:
        """A step decided sequence by sequence."""
        draft = StepDraft(self._config.max_num_batched_tokens)
        self._plan_running(draft, num_in_flight)
        if not draft.short_of_pages:
            self._admit_waiting(draft)
        self._decode_run = None
        if not draft.rows:
            return None
        cascade = self._cascade.plan(draft.rows)
        rows = [draft.rows[i] for i in cascade.order]
        self._counters.copied_pages += sum(1 for copy in draft.page_copies if not copy.pool)
        self._counters.moved_pages += len(self._tier_copies)
        draft.page_copies, self._tier_copies = self._tier_copies + draft.page_copies, []
        plan = build_step_plan(step_id, draft, rows, cascade, self._config, self._tables)
        sequences, version = [row.sequence for row in rows], self._tables.cache.version
        if not is_decode(rows):
            return InFlightStep(plan, sequences, version, rows)
        step = InFlightStep(plan, sequences, version)
        if len(rows) == len(self._roster.running) and self._may_repeat(plan):
            self._decode_run = DecodeRun(step, self._tables, self._cascade)
        return step

    def _may_repeat(self, plan: StepPlan) -> bool:
        """Whether the step after a decode step can be made from it: nothing in it depends on the tokens drawn."""
        return self._drafter is None and not plan.token_bitmasks

    def _plan_running(self, draft: StepDraft, num_in_flight: int) -> None:
        """Every running sequence gets its rows, the earliest first; each later one is left at least a token."""
        drafter = self._drafter
        unplanned = deque(self._roster.running)  # forks that join while this runs are not among them
        while unplanned:
            sequence = unplanned.popleft()
            total_len = sequence.total_len
            num_new = min(total_len - sequence.planned_len, draft.budget - len(unplanned), self._most_rows)
            if num_new <= 0 or total_len >= sequence.max_len:  # the tokens in flight are the last that it may have
                continue
            if sequence.num_unresolved and (drafter is not None or sequence.mask is not None):
                continue  # what comes next depends on tokens that are not known yet
            if drafter is not None:
                drafts = self._propose(drafter, sequence, min(draft.budget - len(unplanned), self._most_rows) - 1)
                if drafts and self._plan_sequence(draft, sequence, 1 + len(drafts), drafts):
                    continue
            while not self._plan_sequence(draft, sequence, num_new):
                draft.short_of_pages = True
                if num_in_flight:  # nobody can go while its token is unresolved
                    self._draining = True
                    break
                victim = unplanned.pop() if unplanned else sequence
                self._roster.preempt(victim)
                if victim is sequence:
                    break

    def _propose(self, drafter: Drafter, sequence: Sequence, most: int) -> tuple[int, ...]:
        """Tokens to check, as many as a sequence may have; none while somebody could be admitted in their place."""
        most = min(most, sequence.max_len - sequence.total_len - 1)
        if most < 1 or not sequence.can_draft:
            return ()
        if self._roster.num_free_lanes and len(self._roster.waiting):
            return ()
        return tuple(islice(drafter(sequence, most), most))

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Admit from the queue, strictly in its order, while there are tokens, lanes and pages.

        A page is kept back for each running sequence, so that an admission does not cause a preemption at once.
        """
        while admission := self._next_admission(draft.budget):
            sequence, match, num_new = admission
            draft.lane_starts.append(self._roster.admit(sequence, match))
            planned = self._plan_sequence(draft, sequence, num_new)
            assert planned, "room was made sure of"

    def _next_admission(self, budget: int) -> tuple[Sequence, PrefixMatch, int] | None:
        """The waiting sequence whose turn it is, what the cache has of it and how many tokens to plan, if it fits."""
        roster = self._roster
        if budget <= 0 or not roster.num_free_lanes:
            return None
        if roster.waiting.is_contended:
            roster.turns.settle(roster.running)
        if (sequence := roster.waiting.first()) is None:
            return None
        match = self._tables.match(sequence)
        num_new = min(len(sequence.token_ids) - match.num_pages * self._config.page_size, budget, self._most_rows)
        fits = self._tables.can_admit(sequence, match, num_new, reserve=len(roster.running))
        return (sequence, match, num_new) if fits else None

    def _plan_sequence(self, draft: StepDraft, sequence: Sequence, num_new: int, drafts: tuple[int, ...] = ()) -> bool:
        """Give a running sequence `num_new` rows, pages for them, and a sample where its last token is among them.

        The last rows are for `drafts`, from which is drawn too.
        """
        start = sequence.planned_len
        end = start + num_new
        copies = self._tables.reserve(sequence, end)
        if copies is None:
            return False
        draft.page_copies.extend(copies)
        draft.budget -= num_new
        sequence.planned_len = end
        if start < sequence.prompt_len or start < sequence.computed_len:
            self._counters.count_rows(start, end, sequence.prompt_len, sequence.computed_len)
            self._tables.publish_planned(sequence, min(end, sequence.prompt_len))
            draft.reports_prompts = draft.reports_prompts or sequence.reports_prompt
        samples: tuple[Sequence, ...] = ()
        if drafts:
            samples = (sequence,)
            sequence.num_unresolved = num_new
        elif end == len(sequence.token_ids) + sequence.num_unresolved:
            samples = (sequence,) if sequence.forked else (sequence, *self._fork(draft, sequence))
            for sampled in samples:
                sampled.num_unresolved += 1
        draft.rows.append(PlannedRows(sequence, start, num_new, samples, drafts))
        return True

    def _fork(self, draft: StepDraft, parent: Sequence) -> list[Sequence]:
        """The other samples of a request that run from the end of its prompt on."""
        forks = self._roster.fork(parent)
        draft.lane_starts.extend(start for _, start in forks)
        return [child for child, _ in forks]
