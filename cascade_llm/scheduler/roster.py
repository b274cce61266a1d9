"""All unfinished sequences: which of them wait, which run, and the lanes and pages of those that run.

add ──► waiting ──admit──► running ──finish──► (pages back to cache and free list)
           ▲                  │
           └────preempt───────┘
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable

from cascade_llm.config import SchedulerConfig
from cascade_llm.metrics import SchedulerCounters
from cascade_llm.plan import LaneStart
from cascade_llm.scheduler.lanes import LanePool
from cascade_llm.scheduler.page_keys import root_key
from cascade_llm.scheduler.pages import PageTables
from cascade_llm.scheduler.prefix_cache import PrefixMatch
from cascade_llm.scheduler.sequence import Request, Sequence, SequenceStatus
from cascade_llm.scheduler.sessions import SessionLimits, SessionName
from cascade_llm.scheduler.waiting import Turns, WaitingQueue
from cascade_llm.scheduler.window_pool import window_pools

__all__ = ["Roster"]


class Roster:
    """Moves sequences between waiting, running and finished, with what that does to pages, lanes, turns and sessions.

    Attributes:
        tables: the page tables, with the prefix cache and what sessions hold of it
        running: those that have a lane, by precedence; to look at only
        waiting: the others
        turns: what each client was served
    """

    tables: PageTables
    running: list[Sequence]
    waiting: WaitingQueue

    def __init__(self, config: SchedulerConfig, counters: SchedulerCounters, clock: Callable[[], float]) -> None:
        """Nobody yet. `clock`: seconds, from any start; for how long sessions live."""
        self._config, self._counters, self._clock = config, counters, clock
        self._session_limits = SessionLimits()
        self._siblings: dict[str, list[Sequence]] = {}
        self._num_arrived = 0
        self.turns = Turns()
        self._begin()

    def _begin(self) -> None:
        """An empty pool, nobody waiting or running."""
        self.tables = PageTables(
            self._config.total_pages,
            self._config.page_size,
            keep_unheld=self._config.enable_prefix_caching,
            window_len=self._config.attention_kinds[0],
            window_pools=window_pools(self._config),
            session_limits=self._session_limits,
            clock=self._clock,
        )
        self.waiting = WaitingQueue(self.turns)
        self.running = []
        self._lanes = LanePool(self._config.max_num_seqs)

    def restart(self) -> dict[str, int]:
        """Begin with new pages, lanes and prefix cache; requests that only waited keep their place, others are gone.

        Returns:
            for each request that goes on the samples that are still to come
        """
        kept = {
            request_id: siblings
            for request_id, siblings in self._siblings.items()
            if siblings and all(sequence.only_waited for sequence in siblings)
        }
        self._begin()
        for request_id, siblings in list(self._siblings.items()):
            for sequence in siblings:
                if request_id in kept:
                    self.waiting.push(sequence)
                else:
                    sequence.status = SequenceStatus.FINISHED
        self._siblings = kept
        return {
            request_id: len(siblings) if siblings[0].forked else siblings[0].request.params.n
            for request_id, siblings in kept.items()
        }

    @property
    def sequences(self) -> list[Sequence]:
        """All unfinished ones."""
        return [sequence for siblings in self._siblings.values() for sequence in siblings]

    @property
    def num_free_lanes(self) -> int:
        """How many more may run."""
        return self._lanes.num_free

    def of_request(self, request_id: str) -> list[Sequence]:
        """The unfinished samples of a request; none of an unknown one."""
        return list(self._siblings.get(request_id, ()))

    def limit_sessions(self, limits: SessionLimits) -> None:
        """Set what may stay between requests; what is beyond it is given up."""
        self._session_limits = limits
        self.tables.limit_sessions(limits)

    def drop_session(self, name: SessionName) -> bool:
        """Give a session up, and keep nothing of its turns that run or wait; returns whether there was anything."""
        found = self.tables.sessions.drop(name)
        for sequence in self.sequences:
            if sequence.session_name == name:
                sequence.session, found = None, True
        return found

    def add(self, request: Request) -> None:
        """Queue a request."""
        assert request.request_id not in self._siblings
        sequence = self._new_sequence(request, 0, self._num_arrived)
        self._num_arrived += 1
        if request.session is not None:
            self.tables.sessions.begin_turn(request.client.tenant, request.session)
        self._siblings[request.request_id] = [sequence]
        if not self.waiting.has(request.client):
            self.turns.settle(self.running)
        self.waiting.push(sequence)

    def admit(self, sequence: Sequence, match: PrefixMatch) -> LaneStart:
        """Let the first in the queue run, on the pages that the prefix cache has of it; there is a lane."""
        popped = self.waiting.pop_first()
        assert popped is sequence
        self.tables.admit(sequence, match)
        matched_len = match.num_pages * self._config.page_size
        sequence.planned_len = sequence.committed_len = matched_len
        if sequence.computed_len == 0:
            sequence.num_cached_tokens = matched_len
            self._counters.cached_tokens += matched_len
            self.turns.charge(sequence.request.client, len(sequence.token_ids) - matched_len)
        return self._start(sequence)

    def fork(self, parent: Sequence) -> list[tuple[Sequence, LaneStart]]:
        """The other samples of a request, at the end of its prompt: these run while there are lanes, others wait."""
        parent.forked = True
        forks = []
        for index in range(1, parent.request.params.n):
            child = self._new_sequence(parent.request, index, parent.arrival)
            self._siblings[parent.request.request_id].append(child)
            if not self._lanes.num_free:
                self.waiting.push(child)
                continue
            self.tables.fork(parent, child)
            child.planned_len = child.committed_len = child.computed_len = parent.planned_len
            forks.append((child, self._start(child)))
        return forks

    def preempt(self, sequence: Sequence) -> None:
        """Send a running sequence back to the queue; its published pages stay cached as long as there is room."""
        assert not sequence.num_unresolved
        self._leave(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.computed_len = max(sequence.computed_len, sequence.planned_len)
        sequence.planned_len = sequence.committed_len = 0
        self.waiting.push(sequence)
        self._counters.preemptions += 1

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence; one that has ended is left alone."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        self.end_turn(sequence, reason)
        if sequence.status is SequenceStatus.RUNNING:
            self._leave(sequence)
        else:
            self.waiting.note_ended(sequence)
        sequence.status = SequenceStatus.FINISHED
        sequence.finish_reason = reason
        request_id = sequence.request.request_id
        siblings = self._siblings[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._siblings[request_id]
            self._counters.finished_requests += 1

    def end_turn(self, sequence: Sequence, reason: str) -> None:
        """Let its session hold the pages of a sequence that ends."""
        use, name = sequence.session, sequence.session_name
        if use is not None and name is not None:
            tail = sequence.tail if self._config.enable_prefix_caching else None
            path = None if tail is None else (tail, sequence.held_from)
            self.tables.sessions.end_turn(name, use, path, reason)

    def check(self) -> None:
        """Assert that nothing is lost: pages, lanes, sequences. Slow, for tests and `debug=True`."""
        self.tables.check(self.running)
        counts = self.tables.counts
        assert counts.free_pages + counts.held_pages + counts.cached_pages == counts.total_pages
        assert len({s.lane for s in self.running}) == len(self.running)
        assert self._lanes.num_free + len(self.running) == self._config.max_num_seqs
        assert sorted(self.running, key=lambda s: s.precedence) == self.running
        assert len(self.waiting) == sum(1 for _ in self.waiting)
        assert len(self.sequences) == len(self.running) + len(self.waiting)

    def _new_sequence(self, request: Request, sample_index: int, arrival: int) -> Sequence:
        salts = [self._config.cache_salt, request.client.tenant.encode(), request.cache_salt]
        if not self._config.enable_prefix_caching:
            salts.append(request.request_id.encode())  # its samples share, other requests do not
        key, max_model_len = root_key(*salts), self._config.max_model_len
        return Sequence(request, sample_index, arrival, self._config.page_size, key, max_model_len)

    def _start(self, sequence: Sequence) -> LaneStart:
        """Let a sequence that has a table run."""
        start = self._lanes.enter(sequence)
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=lambda s: s.precedence)
        return start

    def _leave(self, sequence: Sequence) -> None:
        """Give back lane and pages of a running sequence."""
        self.turns.settle([sequence])
        self.running.remove(sequence)
        self._lanes.leave(sequence)
        if sequence.tail is not None:  # else its pages were discarded already
            self.tables.release(sequence)
