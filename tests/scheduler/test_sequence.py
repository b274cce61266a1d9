"""What a sequence is and what ends it; and the queue in which sequences wait."""

from __future__ import annotations

import random
from typing import Any

from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.prefix_cache import root_key
from cascade_llm.scheduler.sequence import Request, Sequence, SequenceStatus, WaitingQueue


def request(**params: Any) -> Request:
    return Request(
        request_id="a",
        prompt_token_ids=[5, 6, 7],
        params=SamplingParams(**params),
        seed=0,
        priority=2,
        model_ending_token_ids=frozenset({1, 2}),
    )


def test_what_ends_a_request() -> None:
    assert request().ending_token_ids == {1, 2}
    assert request(stop_token_ids=[2, 9]).ending_token_ids == {1, 2, 9}
    assert request(ignore_eos=True).ending_token_ids == set()
    assert request(ignore_eos=True, stop_token_ids=[9]).ending_token_ids == {9}


def test_lengths_count_tokens_that_have_a_place_but_no_id_yet() -> None:
    sequence = Sequence(request(), 0, 4, 16, root_key())
    assert sequence.total_len == 3
    sequence.num_unresolved = 1
    assert sequence.total_len == 4
    sequence.token_ids.append(8)
    sequence.num_unresolved = 0
    assert sequence.total_len == 4
    assert sequence.precedence == (2, 4, 0)


def test_it_ends_at_its_own_limit_or_the_context_s() -> None:
    assert Sequence(request(max_tokens=5), 0, 0, 16, root_key()).max_len == 8
    assert Sequence(request(max_tokens=5), 0, 0, 16, root_key(), max_model_len=6).max_len == 6


def test_only_the_first_sample_forks_and_reports_the_prompt() -> None:
    samples = [Sequence(request(n=2, prompt_logprobs=0), i, 0, 16, root_key()) for i in range(2)]
    assert [s.forked for s in samples] == [False, True]
    assert [s.reports_prompt for s in samples] == [True, False]
    assert Sequence(request(), 0, 0, 16, root_key()).forked


def test_what_a_token_ends() -> None:
    sequence = Sequence(request(max_tokens=3, min_tokens=1), 0, 0, 16, root_key())
    sequence.num_unresolved = 3
    assert sequence.resolve_token(2) is None, "an ending id, but the first token"
    assert sequence.resolve_token(2) == "stop"
    assert sequence.resolve_token(9) == "length"
    assert (sequence.num_unresolved, list(sequence.token_ids)) == (0, [5, 6, 7, 2, 2, 9])


# the queue


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
