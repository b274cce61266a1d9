"""Decides what each step computes.

    add ──► waiting ──admit──► running ──finish──► (pages back to cache and free list)
               ▲                  │
               └────preempt───────┘

`schedule` makes a plan and moves the planned lengths on; `commit` takes the plan's result and moves the committed ones.
Between the two a step is *in flight*: with a lag of one, step n + 1 is planned while step n is. What a plan needs, it
knows from lengths alone; token ids that are not known yet are read on the device.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice, repeat

from cascade_llm.config import SchedulerConfig
from cascade_llm.metrics import PageCounts, SchedulerCounters
from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import PageCopy, StepPlan, StepResult
from cascade_llm.scheduler.cascade.choice import SegmentCosts
from cascade_llm.scheduler.cascade.planner import CascadePlanner
from cascade_llm.scheduler.cascade.tree import PlannedRows
from cascade_llm.scheduler.pages import PageTables
from cascade_llm.scheduler.prefix_cache import PrefixMatch, RadixNode, root_key
from cascade_llm.scheduler.sequence import Request, Sequence, SequenceSharing, SequenceStatus, SequenceUpdate
from cascade_llm.scheduler.sessions import SessionLimits, SessionName, Sessions
from cascade_llm.scheduler.sharing import SharingLedger
from cascade_llm.scheduler.step import DecodeRun, InFlightStep, LanePool, StepDraft, build_step_plan, is_decode
from cascade_llm.scheduler.waiting import Turns, WaitingQueue
from cascade_llm.scheduler.window_pool import window_pools

__all__ = ["Drafter", "FlashInferScheduler", "SequenceUpdate"]

Drafter = Callable[[Sequence, int], Iterable[int]]
"""Proposes the next tokens of a sequence, as many as it likes up to a number, and changes nothing."""


class FlashInferScheduler:
    """Continuous batching over a paged KV cache, with multi-level cascade plans.

    Pure Python: it never sees a tensor. Owns the waiting queue, the page tables with the prefix cache, the lanes and
    the cascade planner.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        costs: SegmentCosts,
        drafter: Drafter | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with an empty pool.

        Args:
            config: limits of the engine
            costs: what segments cost
            drafter: who proposes tokens that steps check, several at once; they change speed, never the text
            clock: seconds, from any start; for how long sessions live
        """
        self.config = config
        self._drafter = drafter
        self.counters = SchedulerCounters()
        self._costs, self._clock = costs, clock
        self._session_limits = SessionLimits()
        self._turns = Turns()
        self._sequences: dict[str, list[Sequence]] = {}
        self._num_arrived = 0
        self._next_step_id = 0
        self._begin()

    def _begin(self) -> None:
        """An empty pool, nobody waiting or running, nothing in flight."""
        config, costs = self.config, self._costs
        self._tables = PageTables(
            config.total_pages,
            config.page_size,
            keep_unheld=config.enable_prefix_caching,
            window_len=config.attention_kinds[0],
            window_pools=window_pools(config),
            session_limits=self._session_limits,
            clock=self._clock,
        )
        self._planner = CascadePlanner(
            config.page_size,
            config.cascade,
            costs,
            self._tables.cache.root,
            config.attention_kinds,
            config.layers_of_kinds,
            [pool.places for pool in self._tables.window_pools],
        )
        self._waiting = WaitingQueue(self._turns)
        self._running: list[Sequence] = []  # by precedence
        self._lanes = LanePool(config.max_num_seqs)
        self._most_rows = config.most_rows_of_sequence
        self._sharing = SharingLedger()
        self._in_flight: deque[InFlightStep] = deque()
        self._decode_run: DecodeRun | None = None
        self._draining = False  # a running sequence lacks pages: plan nothing until no step is in flight
        self._tier_copies: list[PageCopy] = []

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
        """Where the pages of the first pool are."""
        return self._tables.counts

    @property
    def pools(self) -> list[tuple[int | None, PageCounts]]:
        """Of each pool the window of its kind and where its pages are; the first is all kinds', or the first kind's."""
        windows = [(pool.window_len, pool.counts) for pool in self._tables.window_pools]
        return [(self.config.attention_kinds[0], self.page_counts), *windows]

    def add(self, request: Request) -> None:
        """Queue a request. Its prompt fits the context: the caller has checked."""
        assert request.request_id not in self._sequences
        assert 0 < len(request.prompt_token_ids) + min(1, request.params.max_tokens) <= self.config.max_model_len
        sequence = self._new_sequence(request, 0, self._num_arrived)
        self._num_arrived += 1
        if request.session is not None:
            self._tables.sessions.begin_turn(request.client.tenant, request.session)
        self._sequences[request.request_id] = [sequence]
        if not self._waiting.has(request.client):
            self._turns.settle(self._running)
        self._waiting.push(sequence)
        self.counters.requests += 1
        self.counters.prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str) -> None:
        """End every sequence of a request now; an unknown or finished one is left alone."""
        for sequence in list(self._sequences.get(request_id, ())):
            self._finish(sequence, "abort")

    def finish(self, request_id: str, sample_index: int, reason: str) -> SequenceSharing | None:
        """End one sample for a reason that its text gave (a stop string); returns what it shared until now."""
        for sequence in self._sequences.get(request_id, ()):
            if sequence.sample_index == sample_index:
                self._finish(sequence, reason)
                return self._sharing.of(sequence)
        return None

    def reset_prefix_cache(self) -> None:
        """Forget every prefix that no running sequence holds, and every session."""
        self._tables.forget()

    @property
    def sessions(self) -> Sessions:
        """What sessions hold; to look at only."""
        return self._tables.sessions

    @property
    def prefix_tree(self) -> RadixNode:
        """The root of the prefix cache; to look at only."""
        return self._tables.cache.root

    def limit_sessions(self, limits: SessionLimits) -> None:
        """Set what may stay between requests; what is beyond it is given up."""
        self._session_limits = limits
        self._tables.limit_sessions(limits)

    @property
    def tenant_pages(self) -> dict[str, dict[str, int]]:
        """What tenants with budgets have left behind: {tenant: {"left_pages": ..., "budget_pages": ...}}."""
        sessions = self._tables.sessions
        return {
            tenant: {
                "left_pages": self._tables.num_left_pages(tenant),
                "budget_pages": sessions.tenant_budget(tenant) or 0,
            }
            for tenant in sessions.tenants_with_budgets
        }

    def drop_session(self, name: SessionName) -> bool:
        """Give a session up, and keep nothing of its turns that run or wait; returns whether there was anything."""
        found = self._tables.sessions.drop(name)
        for sequence in self.sequences():
            if sequence.session_name == name:
                sequence.session, found = None, True
        return found

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Have pages copied between tiers: the next step that is planned carries the copies, before its first write."""
        self._tier_copies.extend(copies)

    # -- planning ---------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when nothing can run before a step in flight is committed."""
        if self._draining and self._in_flight:
            return None
        self._draining = False
        self._tables.sessions.expire()
        step = self._next_decode_step() or self._new_step()
        if step is None:
            return None
        self._next_step_id += 1
        self._in_flight.append(step)
        self.counters.count_step(step.plan.report)
        self._sharing.count(step)
        return step.plan

    def _next_decode_step(self) -> InFlightStep | None:
        """The last step, moved on by a token; None where anything is to be decided."""
        if (
            self._decode_run is None
            or self._tier_copies
            or self._next_admission(self.config.max_num_batched_tokens - len(self._running)) is not None
        ):
            return None
        return self._decode_run.next_step(self._next_step_id)

    def _new_step(self) -> InFlightStep | None:
        """A step decided sequence by sequence."""
        draft = StepDraft(self.config.max_num_batched_tokens)
        self._plan_running(draft)
        if not draft.short_of_pages:
            self._admit_waiting(draft)
        self._decode_run = None
        if not draft.rows:
            return None
        cascade = self._planner.plan(draft.rows)
        rows = [draft.rows[i] for i in cascade.order]
        self.counters.copied_pages += sum(1 for copy in draft.page_copies if not copy.pool)
        self.counters.moved_pages += len(self._tier_copies)
        draft.page_copies, self._tier_copies = self._tier_copies + draft.page_copies, []
        plan = build_step_plan(self._next_step_id, draft, rows, cascade, self.config, self._tables)
        sequences, version = [row.sequence for row in rows], self._tables.cache.version
        if not is_decode(rows):
            return InFlightStep(plan, sequences, version, rows)
        step = InFlightStep(plan, sequences, version)
        if len(rows) == len(self._running) and self._may_repeat(plan):
            self._decode_run = DecodeRun(step, self._tables, self._planner)
        return step

    def _may_repeat(self, plan: StepPlan) -> bool:
        """Whether the step after a decode step can be made from it: nothing in it depends on the tokens drawn."""
        return self._drafter is None and not plan.token_bitmasks

    def _plan_running(self, draft: StepDraft) -> None:
        """Every running sequence gets its rows, the earliest first; each later one is left at least a token."""
        drafter = self._drafter
        unplanned = deque(self._running)  # forks that join while this runs are not among them
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
                if self._in_flight:  # nobody can go while its token is unresolved
                    self._draining = True
                    break
                victim = unplanned.pop() if unplanned else sequence
                self._preempt(victim)
                if victim is sequence:
                    break

    def _propose(self, drafter: Drafter, sequence: Sequence, most: int) -> tuple[int, ...]:
        """Tokens to check, as many as a sequence may have; none while somebody could be admitted in their place."""
        most = min(most, sequence.max_len - sequence.total_len - 1)
        if most < 1 or not sequence.can_draft:
            return ()
        if self._lanes.num_free and len(self._waiting):
            return ()
        return tuple(islice(drafter(sequence, most), most))

    def _admit_waiting(self, draft: StepDraft) -> None:
        """Admit from the queue, strictly in its order, while there are tokens, lanes and pages.

        A page is kept back for each running sequence, so that an admission does not cause a preemption at once.
        """
        while admission := self._next_admission(draft.budget):
            sequence, match, num_new = admission
            self._waiting.pop_first()
            self._tables.admit(sequence, match)
            matched_len = match.num_pages * self.config.page_size
            sequence.planned_len = sequence.committed_len = matched_len
            if sequence.computed_len == 0:
                sequence.num_cached_tokens = matched_len
                self.counters.cached_tokens += matched_len
                self._turns.charge(sequence.request.client, len(sequence.token_ids) - matched_len)
            self._start(draft, sequence)
            planned = self._plan_sequence(draft, sequence, num_new)
            assert planned, "room was made sure of"

    def _next_admission(self, budget: int) -> tuple[Sequence, PrefixMatch, int] | None:
        """The waiting sequence whose turn it is, what the cache has of it and how many tokens to plan, if it fits."""
        if budget <= 0 or not self._lanes.num_free:
            return None
        if self._waiting.is_contended:
            self._turns.settle(self._running)
        if (sequence := self._waiting.first()) is None:
            return None
        match = self._tables.match(sequence)
        num_new = min(len(sequence.token_ids) - match.num_pages * self.config.page_size, budget, self._most_rows)
        fits = self._tables.can_admit(sequence, match, num_new, reserve=len(self._running))
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
            self.counters.count_rows(start, end, sequence.prompt_len, sequence.computed_len)
            self._tables.publish_planned(sequence, min(end, sequence.prompt_len))
            draft.reports_prompts = draft.reports_prompts or sequence.reports_prompt
        samples: tuple[Sequence, ...] = ()
        if drafts:
            samples = (sequence,)
            sequence.num_unresolved = num_new
        elif end == len(sequence.token_ids) + sequence.num_unresolved:
            samples = (sequence,) if sequence.forked else (sequence, *self._fork_samples(draft, sequence))
            for sampled in samples:
                sampled.num_unresolved += 1
        draft.rows.append(PlannedRows(sequence, start, num_new, samples, drafts))
        return True

    def _fork_samples(self, draft: StepDraft, parent: Sequence) -> list[Sequence]:
        """The other samples of a request, at the end of its prompt: forks while there are lanes, else queued."""
        parent.forked = True
        forks = []
        for index in range(1, parent.request.params.n):
            child = self._new_sequence(parent.request, index, parent.arrival)
            self._sequences[parent.request.request_id].append(child)
            if not self._lanes.num_free:
                self._waiting.push(child)
                continue
            self._tables.fork(parent, child)
            child.planned_len = child.committed_len = child.computed_len = parent.planned_len
            self._start(draft, child)
            forks.append(child)
        return forks

    def _preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue; its published pages stay cached as long as there is room."""
        assert not sequence.num_unresolved
        self._leave(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.computed_len = max(sequence.computed_len, sequence.planned_len)
        sequence.planned_len = sequence.committed_len = 0
        self._waiting.push(sequence)
        self.counters.preemptions += 1

    # -- results ----------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """Take in the result of the oldest step in flight. Rows of sequences that have ended since are dropped."""
        step = self._in_flight.popleft()
        assert step.plan is plan
        assert result.step_id == plan.step_id
        if step.mixed_rows is None and step.version == self._tables.cache.version and not result.failed_samples:
            return self._commit_decode(step, result)
        updates: list[SequenceUpdate] = []
        sample = 0
        prompt_logprobs, accepted_counts = iter(result.prompt_logprobs), iter(result.accepted_counts)
        for row, epoch in zip(step.rows(), plan.sequence_epochs, strict=True):
            reported = row.sequence.take_prompt_logprobs(row.start_len, row.num_new, prompt_logprobs)
            alive = epoch == row.sequence.epoch and row.sequence.status is SequenceStatus.RUNNING
            if row.drafts:
                num_accepted = next(accepted_counts)
                if alive:
                    updates += self._commit_draft(row, num_accepted, result, sample)
                sample += row.num_new
                continue
            if alive:
                self._commit_rows(row.sequence, row.start_len + row.num_new)
            if reported and alive:
                updates.append(row.sequence.update(prompt_logprobs=reported))
            for sampled in row.samples:
                if sampled.status is SequenceStatus.RUNNING and sampled.num_unresolved:
                    updates.append(self._commit_sample(sampled, result, sample))
                sample += 1
        return updates

    def _commit_decode(self, step: InFlightStep, result: StepResult) -> list[SequenceUpdate]:
        """The same for a decode step whose sequences all run on."""
        size = self.config.page_size
        for sequence, end in zip(step.sequences, step.plan.sample_positions, strict=True):
            if end % size:
                sequence.committed_len = end
            else:
                self._commit_rows(sequence, end)
        logprobs = result.logprobs or repeat(None, len(step.sequences))
        return [
            self._commit_token(sequence, token_id, logprob)
            for sequence, token_id, logprob in zip(step.sequences, result.token_ids, logprobs, strict=True)
        ]

    def _commit_draft(
        self, row: PlannedRows, num_accepted: int, result: StepResult, first_sample: int
    ) -> list[SequenceUpdate]:
        """The same for proposed tokens: a decode step for each that was accepted, and one more; the rest never was."""
        sequence, updates = row.sequence, list[SequenceUpdate]()
        sequence.num_unresolved = num_accepted + 1
        sequence.planned_len = row.start_len + num_accepted + 1
        self._tables.truncate(sequence, sequence.planned_len)
        self.counters.drafted_tokens += len(row.drafts)
        self.counters.accepted_tokens += num_accepted
        for i in range(num_accepted + 1):
            self._commit_rows(sequence, row.start_len + i + 1)
            updates.append(self._commit_sample(sequence, result, first_sample + i))
            if updates[-1].finish_reason is not None:
                break
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
            for step in self._in_flight
            for row in step.rows()
            for sequence in (row.sequence, *row.samples)
            if sequence.status is SequenceStatus.RUNNING
        }
        self._in_flight.clear()
        for sequence in list(self._running):
            if sequence in touched:
                self._finish(sequence, "error")
            else:
                self._preempt(sequence)
        self.reset_prefix_cache()
        return [sequence.update(finish_reason="error") for sequence in touched]

    def restart(self) -> dict[str, int]:
        """Begin anew after something was raised in the middle of a call, by a fault of ours or an interruption.

        Nothing that may be half done is believed: pages, lanes, prefix cache and plans are new. Requests that only
        waited keep their place; the others are forgotten, and must be ended by the caller. Steps in flight must not be
        committed.

        Returns:
            for each request that goes on the samples that are still to come
        """
        kept = {
            request_id: siblings
            for request_id, siblings in self._sequences.items()
            if siblings and all(sequence.only_waited for sequence in siblings)
        }
        self._begin()
        self._next_step_id += 1
        for request_id, siblings in list(self._sequences.items()):
            for sequence in siblings:
                if request_id in kept:
                    self._waiting.push(sequence)
                else:
                    sequence.status = SequenceStatus.FINISHED
        self._sequences = kept
        return {
            request_id: len(siblings) if siblings[0].forked else siblings[0].request.params.n
            for request_id, siblings in kept.items()
        }

    def _commit_rows(self, sequence: Sequence, committed_len: int) -> None:
        sequence.committed_len = committed_len
        self._tables.publish_committed(sequence, min(committed_len, len(sequence.token_ids)))

    def _commit_sample(self, sequence: Sequence, result: StepResult, sample: int) -> SequenceUpdate:
        if sample in result.failed_samples:
            self._end_turn(sequence, "error")
            self._tables.discard(sequence)
            self._finish(sequence, "error")
            return sequence.update(finish_reason="error")
        logprob = result.logprobs[sample] if result.logprobs else None
        return self._commit_token(sequence, result.token_ids[sample], logprob)

    def _commit_token(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> SequenceUpdate:
        self.counters.generated_tokens += 1
        reason = sequence.resolve_token(token_id)
        update = SequenceUpdate(
            sequence.request.request_id, sequence.sample_index, sequence.num_cached_tokens, token_id, logprob, reason
        )
        if reason is not None:
            if reason == "stop" and token_id in (sequence.request.params.stop_token_ids or ()):
                update.stop_token_id = token_id
            update.sharing = self._sharing.of(sequence)
            self._finish(sequence, reason)
        elif sequence.mask is not None:
            update.failure = sequence.advance_mask()
            if update.failure is not None:
                update.finish_reason = "error"
                self._finish(sequence, "error")
        return update

    # -- sequences --------------------------------------------------------------------------------------------------

    def _new_sequence(self, request: Request, sample_index: int, arrival: int) -> Sequence:
        salts = [self.config.cache_salt, request.client.tenant.encode(), request.cache_salt]
        if not self.config.enable_prefix_caching:
            salts.append(request.request_id.encode())  # its samples share, other requests do not
        key, max_model_len = root_key(*salts), self.config.max_model_len
        return Sequence(request, sample_index, arrival, self.config.page_size, key, max_model_len)

    def _start(self, draft: StepDraft, sequence: Sequence) -> None:
        """Let a sequence that has a table run."""
        draft.lane_starts.append(self._lanes.enter(sequence))
        sequence.status = SequenceStatus.RUNNING
        insort(self._running, sequence, key=lambda s: s.precedence)

    def _leave(self, sequence: Sequence) -> None:
        """Give back lane and pages of a running sequence."""
        self._turns.settle([sequence])
        self._running.remove(sequence)
        self._lanes.leave(sequence)
        if sequence.tail is not None:  # else its pages were discarded already
            self._tables.release(sequence)

    def _finish(self, sequence: Sequence, reason: str) -> None:
        if sequence.status is SequenceStatus.FINISHED:
            return
        self._end_turn(sequence, reason)
        if sequence.status is SequenceStatus.RUNNING:
            self._leave(sequence)
        else:
            self._waiting.note_ended(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        request_id = sequence.request.request_id
        siblings = self._sequences[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._sequences[request_id]
            self.counters.finished_requests += 1

    def _end_turn(self, sequence: Sequence, reason: str) -> None:
        """Let its session hold the pages of a sequence that ends."""
        use, name = sequence.session, sequence.session_name
        if use is not None and name is not None:
            tail = sequence.tail if self.config.enable_prefix_caching else None
            path = None if tail is None else (tail, sequence.held_from)
            self._tables.sessions.end_turn(name, use, path, reason)

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
        assert self._lanes.num_free + len(self._running) == self.config.max_num_seqs
        assert sorted(self._running, key=lambda s: s.precedence) == self._running
        assert len(self._waiting) == sum(1 for _ in self._waiting)
        assert len(list(self.sequences())) == len(self._running) + len(self._waiting)
