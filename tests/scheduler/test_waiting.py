"""The queue: priorities, those that were preempted, and turns between clients by what they were served."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.page_keys import root_key
from cascade_llm.scheduler.sequence import Client, Request, Sequence, SequenceStatus
from cascade_llm.scheduler.waiting import OUTPUT_WEIGHT, Turns, WaitingQueue
from tests.scheduler.simulated_engine import SimulatedEngine, small_config


def sequence(arrival: int, priority: int = 0, sample_index: int = 0, client: str = "", weight: float = 1) -> Sequence:
    request = Request(
        request_id=str(arrival),
        prompt_token_ids=[1],
        params=SamplingParams(),
        seed=0,
        priority=priority,
        client=Client(name=client, weight=weight),
    )
    return Sequence(request, sample_index, arrival, 4, root_key())


def end(queue: WaitingQueue, waiting: Sequence) -> None:
    waiting.status = SequenceStatus.FINISHED
    queue.note_ended(waiting)


def pop_all(queue: WaitingQueue) -> list[Sequence]:
    popped = []
    while queue.first():
        popped.append(queue.pop_first())
    return popped


def test_priority_then_arrival_then_sample() -> None:
    queue = WaitingQueue(Turns())
    first, second, third, fourth = sequence(7, -1), sequence(0, 0), sequence(3, 0), sequence(3, 0, 1)
    for waiting in (fourth, third, first, second):
        queue.push(waiting)
    assert len(queue) == 4
    assert set(queue) == {first, second, third, fourth}
    assert pop_all(queue) == [first, second, third, fourth]
    assert (queue.first(), len(queue)) == (None, 0)


def test_a_preempted_sequence_returns_to_its_old_place() -> None:
    turns = Turns()
    queue = WaitingQueue(turns)
    old, young, other = sequence(1), sequence(2), sequence(3, client="b")
    for waiting in (old, young, other):
        queue.push(waiting)
    assert queue.pop_first() is old
    turns.charge(old.request.client, 100)
    assert queue.first() is other
    old.computed_len = 1
    queue.push(old)
    assert queue.first() is old, "whoever's turn it is"


def test_sequences_that_have_ended_are_skipped() -> None:
    queue = WaitingQueue(Turns())
    waiting = [sequence(i, client="ab"[i % 2]) for i in range(6)]
    for each in waiting:
        queue.push(each)
    for i in (0, 1, 4):
        end(queue, waiting[i])
    assert len(queue) == 3
    assert set(queue) == {waiting[2], waiting[3], waiting[5]}
    assert set(pop_all(queue)) == {waiting[2], waiting[3], waiting[5]}
    assert len(queue) == 0


def test_one_of_a_client_does_not_wait_for_a_thousand_of_another() -> None:
    turns = Turns()
    queue = WaitingQueue(turns)
    for arrival in range(1000):
        queue.push(sequence(arrival, client="many"))
    for _ in range(100):
        turns.charge(queue.pop_first().request.client, 10)
    late = sequence(1000, client="few")
    queue.push(late)
    turns.charge(queue.pop_first().request.client, 10)
    assert queue.pop_first() is late, "both counters stood where the queue's least stood"


def test_time_without_requests_is_not_made_up_for() -> None:
    turns = Turns()
    queue = WaitingQueue(turns)
    busy, idle = Client(name="busy"), Client(name="idle")
    queue.push(sequence(0, client="busy"))
    queue.pop_first()
    turns.charge(busy, 1000)
    queue.push(sequence(1, client="idle"))
    assert turns.served("idle") == turns.served("busy") == 1000
    turns.charge(idle, 5)
    queue.push(sequence(2, client="busy"))
    assert turns.served("busy") == 1005


class SlowQueue:
    """The same order, looked for among all that wait at each call."""

    def __init__(self) -> None:
        self.waiting: list[Sequence] = []
        self.served: dict[str, float] = {}
        self.last = ""

    def push(self, sequence: Sequence) -> None:
        name = sequence.request.client.name
        others = {s.request.client.name for s in self.waiting}
        if name not in others:
            least = min([self.served.get(other, 0.0) for other in others or {self.last}])
            self.served[name] = max(self.served.get(name, 0.0), least)
        self.waiting.append(sequence)

    def first(self) -> Sequence | None:
        def order(s: Sequence) -> tuple[object, ...]:
            has_run, served = s.computed_len > 0, self.served[s.request.client.name]
            return (s.request.priority, not has_run, 0 if has_run else served, s.precedence)

        return min(self.waiting, key=order, default=None)  # type: ignore[arg-type]

    def remove(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.last = sequence.request.client.name


@pytest.mark.parametrize("num_clients", [1, 4])
def test_queue_does_what_a_search_of_all_does(num_clients: int) -> None:
    rng, turns, twin = random.Random(num_clients), Turns(), SlowQueue()
    queue = WaitingQueue(turns)
    for arrival in range(800):
        client = Client(name="abcd"[rng.randrange(num_clients)], weight=1 + arrival % 2)
        if rng.random() < 0.55:
            new = sequence(arrival, rng.randrange(3), client=client.name, weight=client.weight)
            new.computed_len = rng.choice((0, 0, 0, 5))
            queue.push(new)
            twin.push(new)
        elif twin.waiting and rng.random() < 0.3:
            ended = rng.choice(twin.waiting)
            end(queue, ended)
            twin.remove(ended)
        elif twin.waiting:
            first = twin.first()
            assert first is not None
            assert queue.pop_first() is first
            twin.remove(first)
        if client.name in twin.served:
            num_tokens = rng.randrange(20)
            turns.charge(client, num_tokens)
            twin.served[client.name] += num_tokens / client.weight
        assert len(queue) == len(twin.waiting)
        assert set(queue) == set(twin.waiting)
        assert queue.first() is twin.first()


# with a scheduler


def served_tokens(engine: SimulatedEngine, name: str) -> int:
    """What a client was served, counted from the outside."""
    total = 0
    for (request_id, _), output in engine.outputs.items():
        request = engine.requests[request_id]
        if request.client.name == name:
            total += len(request.prompt_token_ids) + OUTPUT_WEIGHT * len(output.token_ids)
    return total


def load(engine: SimulatedEngine, client: Client, count: int, prompt: Callable[[int], list[int]], tokens: int) -> None:
    for number in range(count):
        engine.add(prompt(number), client=client, max_tokens=tokens, ignore_eos=True)


@pytest.mark.parametrize(("weight", "share"), [(1.0, 1.0), (3.0, 3.0)])
@pytest.mark.parametrize("lag", [0, 1])
def test_clients_are_served_by_their_weights_while_both_wait(weight: float, share: float, lag: int) -> None:
    engine = SimulatedEngine(small_config(total_pages=200, max_num_seqs=4), lag=lag)
    long, short = Client(name="long", weight=weight), Client(name="short")
    load(engine, long, 200, lambda i: [1000 * i + j for j in range(30)], 8)
    load(engine, short, 400, lambda i: [7 + 1000 * i + j for j in range(6)], 5)
    for _ in range(250):
        engine.step()
    assert engine.scheduler.num_waiting > 100
    ratio = served_tokens(engine, "long") / served_tokens(engine, "short")
    assert 0.8 * share < ratio < 1.25 * share


def test_a_late_client_runs_beside_one_with_a_long_queue_and_prefixes_still_meet() -> None:
    engine = SimulatedEngine(small_config(max_num_seqs=4))
    header = list(range(16))
    many = Client(name="many", tenant="a")
    load(engine, many, 80, lambda i: [*header, 100 + i], 6)
    for _ in range(10):
        engine.step()
    late = [engine.add([*header, 500 + i], client=Client(name="few", tenant="b"), max_tokens=4) for i in range(4)]
    for _ in range(40):
        engine.step()
    assert all((request_id, 0) in engine.outputs for request_id in late)
    assert engine.scheduler.num_waiting > 30, "of the others most still wait"
    plans = engine.run()
    engine.check_outputs()
    assert max(plan.report.num_groups for plan in plans) > 0


def test_clients_of_two_tenants_share_nothing_and_those_of_one_share_all() -> None:
    header = list(range(40))
    for tenants, num_cached, num_groups in ((("a", "b"), 0, 0), (("a", "a"), 40, 1)):
        engine = SimulatedEngine()
        first, second = (
            engine.add([*header, 90 + i], client=Client(name=str(i), tenant=tenant), max_tokens=6)
            for i, tenant in enumerate(tenants)
        )
        plans = engine.run()
        engine.check_outputs()
        assert engine.counters.cached_tokens == num_cached
        assert max(plan.report.num_groups for plan in plans) == num_groups
        third = engine.add([*header, 99], client=Client(name="2", tenant="c"))
        before = engine.counters.cached_tokens
        engine.run()
        assert engine.counters.cached_tokens == before, "nor of what has ended"
        assert len({first, second, third}) == 3
