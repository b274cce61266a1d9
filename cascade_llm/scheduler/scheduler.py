"""What each step computes, and what comes of it: the scheduler that the engine holds.

`schedule` makes a plan and moves the planned lengths on; `commit` takes the plan's result and moves the committed ones.
Between the two a step is *in flight*: with a lag of one, step n + 1 is planned while step n is. What a plan needs, it
knows from lengths alone; token ids that are not known yet are read on the device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from cascade_llm.config import SchedulerConfig
from cascade_llm.metrics import PageCounts, SchedulerCounters
from cascade_llm.plan import PageCopy, StepPlan, StepResult
from cascade_llm.scheduler.cascade.choice import SegmentCosts
from cascade_llm.scheduler.commit import StepCommitter
from cascade_llm.scheduler.prefix_cache import RadixNode
from cascade_llm.scheduler.roster import Roster
from cascade_llm.scheduler.sequence import Request, Sequence, SequenceSharing, SequenceStatus, SequenceUpdate
from cascade_llm.scheduler.sessions import SessionLimits, SessionName, Sessions
from cascade_llm.scheduler.sharing import SharingLedger
from cascade_llm.scheduler.step import InFlightStep
from cascade_llm.scheduler.step_planner import Drafter, StepPlanner

__all__ = ["Drafter", "FlashInferScheduler", "SequenceUpdate"]


class FlashInferScheduler:
    """Continuous batching over a paged KV cache, with multi-level cascade plans.

    Pure Python: it never sees a tensor. Who waits and runs is the roster's, a step's content the planner's, what its
    result does the committer's; the order of steps is kept here.
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
        self.counters = SchedulerCounters()
        self._costs, self._drafter = costs, drafter
        self._roster = Roster(config, self.counters, clock)
        self._next_step_id = 0
        self._begin()

    def _begin(self) -> None:
        """Nothing planned and nothing in flight, on the roster's pages."""
        self._sharing = SharingLedger()
        self._planner = StepPlanner(self.config, self._costs, self._roster, self.counters, self._drafter)
        self._committer = StepCommitter(self.config.page_size, self._roster, self.counters, self._sharing)
        self._in_flight: deque[InFlightStep] = deque()

    # -- requests ---------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Its prompt fits the context: the caller has checked."""
        assert 0 < len(request.prompt_token_ids) + min(1, request.params.max_tokens) <= self.config.max_model_len
        self._roster.add(request)
        self.counters.requests += 1
        self.counters.prompt_tokens += len(request.prompt_token_ids)

    def abort(self, request_id: str) -> None:
        """End every sequence of a request now; an unknown or finished one is left alone."""
        for sequence in self._roster.of_request(request_id):
            self._roster.finish(sequence, "abort")

    def finish(self, request_id: str, sample_index: int, reason: str) -> SequenceSharing | None:
        """End one sample for a reason that its text gave (a stop string); returns what it shared until now."""
        for sequence in self._roster.of_request(request_id):
            if sequence.sample_index == sample_index:
                self._roster.finish(sequence, reason)
                return self._sharing.of(sequence)
        return None

    # -- steps ------------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Plan the next step; None when nothing can run before a step in flight is committed."""
        step = self._planner.plan(self._next_step_id, len(self._in_flight))
        if step is None:
            return None
        self._next_step_id += 1
        self._in_flight.append(step)
        self.counters.count_step(step.plan.report)
        self._sharing.count(step)
        return step.plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """Take in the result of the oldest step in flight. Rows of sequences that have ended since are dropped."""
        step = self._in_flight.popleft()
        assert step.plan is plan
        assert result.step_id == plan.step_id
        return self._committer.commit(step, result)

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
        for sequence in list(self._roster.running):
            if sequence in touched:
                self._roster.finish(sequence, "error")
            else:
                self._roster.preempt(sequence)
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
        kept = self._roster.restart()
        self._begin()
        self._next_step_id += 1
        return kept

    def copy_pages(self, copies: Iterable[PageCopy]) -> None:
        """Have pages copied between tiers: the next step that is planned carries the copies, before its first write."""
        self._planner.copy_pages(copies)

    # -- what stays between requests --------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> None:
        """Forget every prefix that no running sequence holds, and every session."""
        self._roster.tables.forget()

    @property
    def prefix_tree(self) -> RadixNode:
        """The root of the prefix cache; to look at only."""
        return self._roster.tables.cache.root

    @property
    def sessions(self) -> Sessions:
        """What sessions hold; to look at only."""
        return self._roster.tables.sessions

    def limit_sessions(self, limits: SessionLimits) -> None:
        """Set what may stay between requests; what is beyond it is given up."""
        self._roster.limit_sessions(limits)

    def drop_session(self, name: SessionName) -> bool:
        """Give a session up, and keep nothing of its turns that run or wait; returns whether there was anything."""
        return self._roster.drop_session(name)

    @property
    def tenant_pages(self) -> dict[str, dict[str, int]]:
        """What tenants with budgets have left behind: {tenant: {"left_pages": ..., "budget_pages": ...}}."""
        tables = self._roster.tables
        return {
            tenant: {
                "left_pages": tables.num_left_pages(tenant),
                "budget_pages": tables.sessions.tenant_budget(tenant) or 0,
            }
            for tenant in tables.sessions.tenants_with_budgets
        }

    # -- counts -----------------------------------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        """Whether anything waits, runs or is in flight."""
        return bool(self._roster.running or len(self._roster.waiting) or self._in_flight)

    @property
    def num_running(self) -> int:
        """Sequences that have a lane."""
        return len(self._roster.running)

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._roster.waiting)

    @property
    def num_in_flight(self) -> int:
        """Steps that were planned and not committed."""
        return len(self._in_flight)

    @property
    def page_counts(self) -> PageCounts:
        """Where the pages of the first pool are."""
        return self._roster.tables.counts

    @property
    def pools(self) -> list[tuple[int | None, PageCounts]]:
        """Of each pool the window of its kind and where its pages are; the first is all kinds', or the first kind's."""
        windows = [(pool.window_len, pool.counts) for pool in self._roster.tables.window_pools]
        return [(self.config.attention_kinds[0], self.page_counts), *windows]

    def sequences(self) -> Iterable[Sequence]:
        """All unfinished sequences."""
        return self._roster.sequences

    def check(self) -> None:
        """Assert that nothing is lost: pages, lanes, sequences. Slow, for tests and `debug=True`."""
        self._roster.check()
