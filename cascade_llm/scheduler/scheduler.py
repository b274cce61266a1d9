"""Decides what each step computes.

    add ──► waiting ──admit──► running ──finish──► (pages back to cache and free list)
               ▲                  │
               └────preempt───────┘

`schedule` makes a plan and moves the planned lengths on; `commit` takes the plan's result and moves the committed ones.
Between the two a step is *in flight*: with a lag of one, step n + 1 is planned while step n is. What a plan needs, it
knows from lengths alone; token ids that are not known yet are read on the device.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cascade_llm.config import SchedulerConfig
from cascade_llm.metrics import PageCounts, SchedulerCounters
from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import LaneStart, StepPlan, StepResult
from cascade_llm.scheduler.cascade_planner import CascadePlanner
from cascade_llm.scheduler.page_keys import root_key
from cascade_llm.scheduler.page_tables import PageTables
from cascade_llm.scheduler.segment_choice import SegmentCosts
from cascade_llm.scheduler.sequence import Request, Sequence, SequenceStatus
from cascade_llm.scheduler.step_draft import PlannedSequence, StepDraft, build_step_plan, planned_rows
from cascade_llm.scheduler.waiting_queue import WaitingQueue

__all__ = ["FlashInferScheduler", "SequenceUpdate"]


@dataclass(slots=True)
class SequenceUpdate:
    """What a commit did to one sequence: a new token, prompt log-probabilities, an end."""

    request_id: str
    sample_index: int
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
    """"stop", "length" or "error"."""
    stop_token_id: int | None = None
    """The `stop_token_ids` entry that ended it; None for the model's own ending ids."""
    prompt_logprobs: list[TokenLogprob] | None = None
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class _InFlight:
    plan: StepPlan
    planned: list[PlannedSequence]
    """In the order of the plan's leaf segments."""


class FlashInferScheduler:
    """Continuous batching over a paged KV cache, with multi-level cascade plans.

    Pure Python: it never sees a tensor. Owns the waiting queue, the page tables with the prefix cache, the lanes and
    the cascade planner.
    """

    def __init__(self, config: SchedulerConfig, costs: SegmentCosts) -> None:
        self.config = config
        self.counters = SchedulerCounters()
        self._tables = PageTables(config.total_pages, config.page_size, keep_unheld=config.enable_prefix_caching)
        self._planner = CascadePlanner(config.page_size, config.cascade, costs, self._tables.cache.root)
        self._waiting = WaitingQueue()
        self._running: list[Sequence] = []  # by precedence
        self._sequences: dict[str, list[Sequence]] = {}
        self._free_lanes = list(range(config.max_num_seqs))
        self._lane_epochs = [0] * config.max_num_seqs
        self._in_flight: deque[_InFlight] = deque()
        self._draining = False  # a running sequence lacks pages: plan nothing until no step is in flight
        self._num_arrived = 0
        self._next_step_id = 0

    # -- requests ---------------------------------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        """Whether anything waits, runs or is in flight."""
        return bool(self._running or len(self._waiting) or self._in_flight)

    @property
    def num_running(self) -> int:
        """Sequences that have a lane."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and not committed."""
        return len(self._in_flight)

    @property
    def page_counts(self) -> PageCounts:
        """Where the pages of the pool are."""
        return self._tables.counts

    def add(self, request: Request) -> None:
        """Queue a request. Its prompt fits the context: the caller has checked."""
        assert request.request_id not in self._sequences
        assert 0 < len(request.prompt_token_ids) < self.config.max_model_len
        self._sequences[request.request_id] = []
        self._waiting.push(self._new_sequence(request, 0, self._num_arrived))
        self._num_arrived += 1
        self.counters.requests += 1
        self.counters.prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str) -> None:
        """End every sequence of a request now; an unknown or finished one is left alone."""
        for sequence in list(self._sequences.get(request_id, ())):
            self._finish(sequence, "abort")

    def finish(self, request_id: str, sample_index: int, reason: str) -> None:
        """End one sample for a reason that its text gave (a stop string)."""
        for sequence in list(self._sequences.get(request_id, ())):
            if sequence.sample_index == sample_index:
                self._finish(sequence, reason)

    def reset_prefix_cache(self) -> None:
        """Forget every prefix that no running sequence holds."""
        self._tables.evict(self._tables.cache.num_cached_pages)

    # -- planning ---------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when nothing can run before a step in flight is committed."""
        if self._draining and self._in_flight:
            return None
        self._draining = False
        draft = StepDraft(self.config.max_num_batched_tokens)
        self._plan_running(draft)
        if not draft.short_of_pages:
            self._admit_waiting(draft)
        if not draft.planned:
            return None
        cascade = self._planner.plan(planned_rows(draft))
        plan = build_step_plan(self._next_step_id, draft, cascade, self.config.page_size)
        self._next_step_id += 1
        self._in_flight.append(_InFlight(plan, [draft.planned[i] for i in cascade.order]))
        self.counters.count_step(plan.report)
        return plan

    def _plan_running(self, draft: StepDraft) -> None:
        """Every running sequence gets its rows, the earliest first; each later one is left at least a token."""
        unplanned = deque(self._running)  # forks that join while this runs are not among them
        while unplanned:
            sequence = unplanned.popleft()
            num_new = min(sequence.num_to_plan, draft.budget - len(unplanned))
            if num_new <= 0 or self._ends_by_count(sequence):
                continue
            while not self._plan_sequence(draft, sequence, num_new):
                draft.short_of_pages = True
                if self._in_flight:  # nobody can go while its token is unresolved
                    self._draining = True
                    break
                victim = unplanned.pop() if unplanned else sequence
                self._preempt(victim)
                if victim is sequence:
                    break

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Admit from the queue, strictly in its order, while there are tokens, lanes and pages.

        A page is kept back for each running sequence, so that an admission does not cause a preemption at once.
        """
        while draft.budget > 0 and self._free_lanes and (sequence := self._waiting.first()):
            match = self._tables.match(sequence)
            matched_len = match.num_pages * self.config.page_size
            num_new = min(len(sequence.token_ids) - matched_len, draft.budget)
            if not self._tables.can_admit(sequence, match, num_new, reserve=len(self._running)):
                break
            self._waiting.pop_first()
            self._tables.admit(sequence, match)
            sequence.planned_len = sequence.committed_len = matched_len
            if sequence.computed_len == 0:
                sequence.num_cached_tokens = matched_len
                self.counters.cached_tokens += matched_len
            self._enter_lane(draft, sequence)
            planned = self._plan_sequence(draft, sequence, num_new)
            assert planned, "room was made sure of"

    def _plan_sequence(self, draft: StepDraft, sequence: Sequence, num_new: int) -> bool:
        """Give a running sequence `num_new` rows, pages for them, and a sample where its last token is among them."""
        start = sequence.planned_len
        end = start + num_new
        copies = self._tables.reserve(sequence, end)
        if copies is None:
            return False
        draft.page_copies.extend(copies)
        draft.budget -= num_new
        entry = PlannedSequence(sequence, sequence.epoch, start, num_new)
        draft.planned.append(entry)
        self._count_rows(sequence, start, end)
        ends_known = end == sequence.total_len
        sequence.planned_len = end
        sequence.computed_len = max(sequence.computed_len, end)
        self._tables.publish_planned(sequence, min(end, sequence.prompt_len))
        if ends_known:
            entry.samples.append(sequence)
            if not sequence.forked:
                entry.samples.extend(self._fork_samples(draft, sequence))
            for sampled in entry.samples:
                sampled.num_unresolved += 1
        return True

    def _fork_samples(self, draft: StepDraft, parent: Sequence) -> list[Sequence]:
        """The other samples of a request, at the end of its prompt: forks while there are lanes, else queued."""
        parent.forked = True
        forks = []
        for index in range(1, parent.request.params.n):
            child = self._new_sequence(parent.request, index, parent.arrival)
            if not self._free_lanes:
                self._waiting.push(child)
                continue
            self._tables.fork(parent, child)
            child.planned_len = child.committed_len = child.computed_len = parent.planned_len
            self._enter_lane(draft, child)
            forks.append(child)
        return forks

    def _count_rows(self, sequence: Sequence, start: int, end: int) -> None:
        counters = self.counters
        if start < sequence.computed_len:
            counters.recomputed_tokens += min(end, sequence.computed_len) - start
        counters.prefilled_tokens += max(0, min(end, max(sequence.prompt_len, sequence.computed_len)) - start)

    def _ends_by_count(self, sequence: Sequence) -> bool:
        """Whether the tokens in flight are the last that it may have."""
        return (
            sequence.num_generated >= sequence.request.params.max_tokens
            or sequence.total_len >= self.config.max_model_len
        )

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue; its published pages stay cached as long as there is room."""
        assert not sequence.num_unresolved
        self._leave(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.planned_len = sequence.committed_len = 0
        self._waiting.push(sequence)
        self.counters.preemptions += 1

    # -- results ----------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """Take in the result of the oldest step in flight. Rows of sequences that have ended since are dropped."""
        in_flight = self._in_flight.popleft()
        assert in_flight.plan is plan
        assert result.step_id == plan.step_id
        updates: list[SequenceUpdate] = []
        sample = 0
        prompt_logprobs = iter(result.prompt_logprobs)
        for entry in in_flight.planned:
            reported = self._take_prompt_logprobs(entry, prompt_logprobs)
            alive = entry.epoch == entry.sequence.epoch
            if alive:
                self._commit_rows(entry)
            if reported and alive:
                updates.append(self._update(entry.sequence, prompt_logprobs=reported))
            for sampled in entry.samples:
                if sampled.status is SequenceStatus.RUNNING and sampled.num_unresolved:
                    updates.append(self._commit_sample(sampled, result, sample))
                sample += 1
        return updates

    def fail(self, plan: StepPlan) -> list[SequenceUpdate]:
        """A step raised: end its sequences, and forget every prefix, since it may be one that the step was to fill.

        The steps in flight after it were planned on its result, so they are dropped too: do not commit them. Sequences
        that run but are in none of these steps start again.
        """
        assert self._in_flight
        assert self._in_flight[0].plan is plan
        touched = {
            sequence: None
            for in_flight in self._in_flight
            for entry in in_flight.planned
            for sequence in (entry.sequence, *entry.samples)
            if sequence.status is SequenceStatus.RUNNING
        }
        self._in_flight.clear()
        for sequence in list(self._running):
            if sequence in touched:
                self._finish(sequence, "error")
            else:
                self._preempt(sequence)
        self.reset_prefix_cache()
        return [self._update(sequence, finish_reason="error") for sequence in touched]

    def _commit_rows(self, entry: PlannedSequence) -> None:
        sequence = entry.sequence
        sequence.committed_len = entry.start_len + entry.num_new
        known_len = min(sequence.committed_len, len(sequence.token_ids))
        self._tables.publish_committed(sequence, known_len)

    def _commit_sample(self, sequence: Sequence, result: StepResult, sample: int) -> SequenceUpdate:
        sequence.num_unresolved -= 1
        if sample in result.failed_samples:
            self._tables.discard(sequence)
            self._finish(sequence, "error")
            return self._update(sequence, finish_reason="error")
        token_id = result.token_ids[sample]
        sequence.token_ids.append(token_id)
        self.counters.generated_tokens += 1
        update = self._update(sequence, token_id=token_id)
        update.logprob = result.logprobs[sample] if result.logprobs else None
        reason = self._end_reason(sequence, token_id)
        if reason is not None:
            update.finish_reason = reason
            if reason == "stop" and token_id in (sequence.request.params.stop_token_ids or ()):
                update.stop_token_id = token_id
            self._finish(sequence, reason)
        return update

    def _end_reason(self, sequence: Sequence, token_id: int) -> str | None:
        request, num_generated = sequence.request, len(sequence.token_ids) - sequence.prompt_len
        if token_id in request.ending_token_ids and num_generated > request.params.min_tokens:
            return "stop"
        if num_generated >= request.params.max_tokens or len(sequence.token_ids) >= self.config.max_model_len:
            return "length"
        return None

    def _take_prompt_logprobs(
        self, entry: PlannedSequence, prompt_logprobs: Iterator[TokenLogprob]
    ) -> list[TokenLogprob]:
        """The part of a result's prompt log-probabilities that belongs to this sequence's rows."""
        sequence = entry.sequence
        if not sequence.reports_prompt:
            return []
        first = max(entry.start_len, sequence.num_prompt_logprobs)
        last = min(entry.start_len + entry.num_new, sequence.prompt_len - 1)
        reported = [next(prompt_logprobs) for _ in range(first, last)]
        sequence.num_prompt_logprobs += len(reported)
        return reported

    @staticmethod
    def _update(
        sequence: Sequence,
        *,
        token_id: int | None = None,
        finish_reason: str | None = None,
        prompt_logprobs: list[TokenLogprob] | None = None,
    ) -> SequenceUpdate:
        return SequenceUpdate(
            sequence.request.request_id,
            sequence.sample_index,
            num_cached_tokens=sequence.num_cached_tokens,
            token_id=token_id,
            finish_reason=finish_reason,
            prompt_logprobs=prompt_logprobs,
        )

    # -- sequences --------------------------------------------------------------------------------------------------

    def _new_sequence(self, request: Request, sample_index: int, arrival: int) -> Sequence:
        salts = [self.config.cache_salt, request.cache_salt]
        if not self.config.enable_prefix_caching:
            salts.append(request.request_id.encode())  # its samples share, other requests do not
        sequence = Sequence(request, sample_index, arrival, self.config.page_size, root_key(*salts))
        self._sequences[request.request_id].append(sequence)
        return sequence

    def _enter_lane(self, draft: StepDraft, sequence: Sequence) -> None:
        lane = heapq.heappop(self._free_lanes)
        self._lane_epochs[lane] += 1
        sequence.lane, sequence.epoch = lane, self._lane_epochs[lane]
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=lambda s: s.precedence)
        request = sequence.request
        draft.lane_starts.append(
            LaneStart(
                lane=lane,
                epoch=sequence.epoch,
                params=request.params,
                seed=request.seed,
                sample_index=sequence.sample_index,
                prompt_token_ids=request.prompt_token_ids,
                output_token_ids=sequence.token_ids[sequence.prompt_len :],
                ending_token_ids=request.ending_token_ids,
            )
        )

    def _leave(self, sequence: Sequence) -> None:
        """Give back lane and pages of a running sequence."""
        self._running.remove(sequence)
        heapq.heappush(self._free_lanes, sequence.lane)
        sequence.epoch = 0
        if sequence.tail is not None:  # else its pages were discarded already
            self._tables.release(sequence)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._leave(sequence)
        else:
            self._waiting.note_ended()
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        request_id = sequence.request.request_id
        siblings = self._sequences[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[request_id]
            self.counters.finished_requests += 1

    # -- checks -----------------------------------------------------------------------------------------------------

    def sequences(self) -> Iterable[Sequence]:
        """All unfinished sequences."""
        return [sequence for siblings in self._sequences.values() for sequence in siblings]

    def check(self) -> None:
        """Assert that nothing is lost: pages, lanes, sequences. Slow, for tests and `debug=True`."""
        self._tables.check(self._running)
        counts = self.page_counts
        assert counts.free_pages + counts.held_pages + counts.cached_pages == counts.total_pages
        assert len({s.lane for s in self._running}) == len(self._running)
        assert len(self._free_lanes) + len(self._running) == self.config.max_num_seqs
        assert sorted(self._running, key=lambda s: s.precedence) == self._running
        assert len(self._waiting) == sum(1 for _ in self._waiting)
        assert len(list(self.sequences())) == len(self._running) + len(self._waiting)
