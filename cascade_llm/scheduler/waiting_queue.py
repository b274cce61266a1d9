"""Sequences that wait to be admitted: by priority, then by arrival."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from cascade_llm.scheduler.sequence import Sequence, SequenceStatus

__all__ = ["WaitingQueue"]


class WaitingQueue:
    """A heap over `Sequence.precedence`. A preempted sequence returns to its old place."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], Sequence]] = []
        self._num_ended = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_ended

    def __iter__(self) -> Iterator[Sequence]:
        """All waiting sequences, in no particular order."""
        return (sequence for _, sequence in self._heap if sequence.status is SequenceStatus.WAITING)

    def push(self, sequence: Sequence) -> None:
        """Add a sequence whose status is WAITING."""
        heapq.heappush(self._heap, (sequence.precedence, sequence))

    def first(self) -> Sequence | None:
        """The sequence to admit next, or None."""
        while self._heap and self._heap[0][1].status is not SequenceStatus.WAITING:
            heapq.heappop(self._heap)
            self._num_ended -= 1
        return self._heap[0][1] if self._heap else None

    def pop_first(self) -> Sequence:
        """Remove and return `first()`, which must be there."""
        sequence = self.first()
        assert sequence is not None
        heapq.heappop(self._heap)
        return sequence

    def note_ended(self) -> None:
        """A sequence in the queue has left the WAITING status; it is dropped when it comes up."""
        self._num_ended += 1
