"""Sequences that wait to be admitted, and whose turn it is.

Priorities go first. Within one, a sequence that had run and was preempted goes before all that have not; the others
take turns by client, each client's own in order of arrival. The turn is the client's that was served least: virtual
token counters (Sheng et al. 2024, "Fairness in Serving Large Language Models"). So a client with a thousand requests
in the queue waits for itself, and one that comes with a single request does not wait for the thousand.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator

from cascade_llm.scheduler.sequence import Client, Sequence, SequenceStatus

__all__ = ["OUTPUT_WEIGHT", "Turns", "WaitingQueue"]

OUTPUT_WEIGHT = 2
"""What a generated token counts beside one of a prompt that is computed, as in the paper."""

Heap = list[tuple[tuple[int, int, int], Sequence]]


class Turns:
    """How much each client was served: computed prompt tokens and generated ones, over the client's weight."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}

    def served(self, client: str) -> float:
        """What a client's counter says."""
        return self._served.get(client, 0.0)

    def join(self, client: str, least: float) -> None:
        """A client has something to wait for again: time in which it asked for nothing is not made up for."""
        self._served[client] = max(self.served(client), least)

    def charge(self, client: Client, num_tokens: int) -> None:
        """Count tokens that were served."""
        self._served[client.name] = self.served(client.name) + num_tokens / client.weight

    def settle(self, sequences: Iterable[Sequence]) -> None:
        """Count what these have generated since they were last counted."""
        for sequence in sequences:
            num_new = len(sequence.token_ids) - sequence.charged_len
            if num_new:
                self.charge(sequence.request.client, OUTPUT_WEIGHT * num_new)
                sequence.charged_len += num_new


class WaitingQueue:
    """All that wait. What is called `first` may change with what `Turns` counts: `pop_first` asks again."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._levels: dict[int, _Level] = {}
        self._priorities: list[int] = []  # a heap of the keys
        self._num_by_client: Counter[str] = Counter()
        self._last_client = ""

    def __len__(self) -> int:
        return self._num_by_client.total()

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        for level in self._levels.values():
            for heap in level.heaps():
                yield from (sequence for _, sequence in heap if sequence.status is SequenceStatus.WAITING)

    @property
    def is_contended(self) -> bool:
        """Whether several clients wait."""
        return len(self._num_by_client) > 1

    def has(self, client: Client) -> bool:
        """Whether a client waits."""
        return client.name in self._num_by_client

    def push(self, sequence: Sequence) -> None:
        """Add a sequence whose status is WAITING."""
        client, priority = sequence.request.client.name, sequence.request.priority
        if client not in self._num_by_client:
            others = self._num_by_client or (self._last_client,)
            self._turns.join(client, min(map(self._turns.served, others)))
        if priority not in self._levels:
            self._levels[priority] = _Level()
            heapq.heappush(self._priorities, priority)
        self._num_by_client[client] += 1
        self._levels[priority].push(sequence)

    def first(self) -> Sequence | None:
        """The sequence to admit next, or None."""
        while self._priorities:
            heap = self._levels[self._priorities[0]].next_heap(self._turns)
            if heap is not None:
                return heap[0][1]
            del self._levels[heapq.heappop(self._priorities)]
        return None

    def pop_first(self) -> Sequence:
        """Remove and return `first()`, which must be there."""
        sequence = self.first()
        assert sequence is not None
        heap = self._levels[self._priorities[0]].next_heap(self._turns)
        assert heap is not None
        heapq.heappop(heap)
        self.note_ended(sequence)
        return sequence

    def note_ended(self, sequence: Sequence) -> None:
        """A sequence in the queue has left the WAITING status; it is dropped when it comes up."""
        client = self._last_client = sequence.request.client.name
        self._num_by_client[client] -= 1
        if not self._num_by_client[client]:
            del self._num_by_client[client]


class _Level:
    """What waits at one priority."""

    def __init__(self) -> None:
        self._preempted: Heap = []
        self._by_client: dict[str, Heap] = {}

    def heaps(self) -> list[Heap]:
        return [self._preempted, *self._by_client.values()]

    def push(self, sequence: Sequence) -> None:
        has_run = sequence.computed_len > 0
        heap = self._preempted if has_run else self._by_client.setdefault(sequence.request.client.name, [])
        heapq.heappush(heap, (sequence.precedence, sequence))

    def next_heap(self, turns: Turns) -> Heap | None:
        """Where the next sequence stands first; None where nothing waits."""
        for heap in self.heaps():
            while heap and heap[0][1].status is not SequenceStatus.WAITING:
                heapq.heappop(heap)
        if self._preempted:
            return self._preempted
        for client in [client for client, heap in self._by_client.items() if not heap]:
            del self._by_client[client]
        turn = min(self._by_client.items(), key=lambda item: (turns.served(item[0]), item[1][0][0]), default=None)
        return None if turn is None else turn[1]
