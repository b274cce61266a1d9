"""Who is admitted next."""

from __future__ import annotations

import random

from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.prefix_cache import root_key
from cascade_llm.scheduler.sequence import Request, Sequence, SequenceStatus, WaitingQueue


def sequence(arrival: int, priority: int = 0, sample_index: int = 0) -> Sequence:
    request = Request(request_id=str(arrival), prompt_token_ids=[1], params=SamplingParams(), seed=0, priority=priority)
    return Sequence(request, sample_index, arrival, 4, root_key())


def pop_all(queue: WaitingQueue) -> list[Sequence]:
    popped = []
    while queue.first():
        popped.append(queue.pop_first())
    return popped


def test_priority_then_arrival_then_sample() -> None:
    queue = WaitingQueue()
    first, second, third, fourth = sequence(7, -1), sequence(0, 0), sequence(3, 0), sequence(3, 0, 1)
    for waiting in (fourth, third, first, second):
        queue.push(waiting)
    assert len(queue) == 4
    assert set(queue) == {first, second, third, fourth}
    assert pop_all(queue) == [first, second, third, fourth]
    assert (queue.first(), len(queue)) == (None, 0)


def test_a_preempted_sequence_returns_to_its_old_place() -> None:
    queue = WaitingQueue()
    old, young = sequence(1), sequence(2)
    queue.push(old)
    queue.push(young)
    assert queue.pop_first() is old
    queue.push(old)
    assert queue.first() is old


def test_sequences_that_have_ended_are_skipped() -> None:
    queue = WaitingQueue()
    waiting = [sequence(i) for i in range(6)]
    for each in waiting:
        queue.push(each)
    for i in (0, 1, 4):
        waiting[i].status = SequenceStatus.FINISHED
        queue.note_ended()
    assert len(queue) == 3
    assert set(queue) == {waiting[2], waiting[3], waiting[5]}
    assert pop_all(queue) == [waiting[2], waiting[3], waiting[5]]
    assert len(queue) == 0


def test_queue_does_what_a_sorted_list_does() -> None:
    rng, queue, twin = random.Random(1), WaitingQueue(), list[Sequence]()
    for arrival in range(500):
        if rng.random() < 0.6:
            twin.append(sequence(arrival, rng.randrange(3)))
            queue.push(twin[-1])
        elif twin and rng.random() < 0.3:
            twin.pop(rng.randrange(len(twin))).status = SequenceStatus.FINISHED
            queue.note_ended()
        elif twin:
            twin.sort(key=lambda s: s.precedence)
            assert queue.pop_first() is twin.pop(0)
        assert len(queue) == len(twin)
        assert queue.first() is min(twin, key=lambda s: s.precedence, default=None)
