"""Too few pages, lanes or tokens for all: who runs, who waits, who has to go."""

from __future__ import annotations

import pytest

from cascade_llm.errors import ConfigError
from tests.scheduler.simulated_engine import SimulatedEngine, small_config


@pytest.mark.parametrize("lag", [0, 1])
def test_the_younger_is_preempted_and_keeps_its_place(lag: int) -> None:
    engine = SimulatedEngine(small_config(total_pages=8, max_model_len=32), lag=lag)
    old, young = (engine.add([own] * 8, max_tokens=16) for own in (100, 101))
    for _ in range(5):
        engine.step()
    last = engine.add([102] * 8, max_tokens=2)
    engine.run()
    assert engine.counters.preemptions >= 1
    assert list(engine.outputs) == [(old, 0), (young, 0), (last, 0)]
    engine.check_outputs()


@pytest.mark.parametrize(("total_pages", "recomputed_tokens"), [(9, 0), (8, 4), (7, 4)])
def test_pages_of_a_preempted_sequence_stay_cached_while_there_is_room(
    total_pages: int, recomputed_tokens: int
) -> None:
    engine = SimulatedEngine(small_config(total_pages=total_pages, max_model_len=28))
    for own in (100, 101):
        engine.add([own] * 8, max_tokens=12)
    while not engine.counters.preemptions:
        plan = engine.step()
    assert plan is not None
    assert plan.num_sequences == 1
    assert engine.scheduler.page_counts.cached_pages > 0
    engine.run()
    engine.check_outputs()
    assert engine.counters.recomputed_tokens == recomputed_tokens
    assert engine.counters.prefilled_tokens == 2 * 8 + recomputed_tokens
    assert engine.counters.cached_tokens == 0, "its own pages are no hits"


def test_the_youngest_goes_first_and_only_as_many_as_must() -> None:
    engine = SimulatedEngine(small_config(total_pages=16, max_model_len=64, max_num_batched_tokens=16, max_num_seqs=4))
    old, young = engine.add([100] * 16, max_tokens=9), engine.add([101] * 16, max_tokens=9)
    for _ in range(4):
        engine.step()
    urgent = engine.add(range(44), priority=-1)
    while not engine.counters.preemptions:
        engine.step()
    assert {s.request.request_id for s in engine.scheduler.sequences() if s.pages} == {urgent, old}
    assert engine.counters.preemptions == 1
    engine.run()
    engine.check_outputs()
    assert engine.outputs[young, 0].finish_reason == "length"


def test_nobody_is_admitted_in_the_step_that_preempts() -> None:
    config = small_config(total_pages=16, max_num_batched_tokens=17, max_model_len=64, enable_prefix_caching=False)
    engine = SimulatedEngine(config)
    engine.add([100] * 8, max_tokens=30)
    engine.step()
    engine.add([101] * 45, max_tokens=10)
    while not engine.counters.preemptions:
        plan = engine.step()
    assert plan is not None
    assert plan.lane_starts == (), "though a first chunk of it would fit again"
    plan = engine.step()
    assert plan is not None
    assert len(plan.lane_starts) == 1
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize("lag", [0, 1])
def test_the_pool_holds_one_sequence_of_any_length_and_all_get_through(lag: int) -> None:
    engine = SimulatedEngine(small_config(total_pages=8, max_model_len=32), lag=lag)
    for own in range(6):
        engine.add([100 + own] * 8, max_tokens=100, n=2)
    engine.run()
    engine.check_outputs()
    assert all(len(output.token_ids) == 24 for output in engine.outputs.values())


def test_a_pool_too_small_for_one_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="7 pages of 4 tokens, one sequence of max_model_len 32 needs 8"):
        small_config(total_pages=7, max_model_len=32)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_long_prompt_is_not_passed_by_newer_ones_for_ever(lag: int) -> None:
    """It needs many pages at once; short requests that come all the time need few, and with a lag a step is always in
    flight, so that nobody can be preempted."""
    config = small_config(total_pages=40, max_model_len=160, max_num_batched_tokens=64)
    engine = SimulatedEngine(config, lag=lag)
    for i in range(7):
        engine.add([100 + i] * 3, max_tokens=5 + 3 * i)
    for _ in range(3):
        engine.step()
    long = engine.add(range(150), max_tokens=3)
    for _ in range(60):
        while engine.scheduler.num_waiting < 3:
            engine.add([100 + len(engine.requests)] * 3, max_tokens=9)
        engine.step()
    assert engine.outputs[long, 0] == engine.expected(long)


def test_the_budget_bounds_the_rows_of_every_step() -> None:
    engine = SimulatedEngine(small_config(max_num_batched_tokens=12))
    for own in range(8):
        engine.add([100 + own] * 10, max_tokens=8)
    plans = engine.run()
    assert max(plan.num_rows for plan in plans) == 12
    engine.check_outputs()


def test_an_urgent_prompt_leaves_every_running_sequence_a_token() -> None:
    engine = SimulatedEngine(small_config(max_num_batched_tokens=12))
    for own in (100, 101):
        engine.add([own], max_tokens=20)
    engine.step()
    engine.add(range(40), priority=-1)
    rows = [(plan.num_sequences, plan.num_rows) for plan in (engine.step() for _ in range(5)) if plan]
    assert rows == [(3, 12), (3, 12), (3, 12), (3, 12), (3, 3)]


def test_lanes_bound_the_sequences_and_are_used_again() -> None:
    engine = SimulatedEngine(small_config(max_num_seqs=2))
    for own in range(5):
        engine.add([100 + own], max_tokens=3)
    plans = engine.run()
    starts = [(start.lane, start.epoch) for plan in plans for start in plan.lane_starts]
    assert starts == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3)]
    engine.check_outputs()


def test_priorities_come_before_arrival() -> None:
    engine = SimulatedEngine(small_config(max_num_seqs=1))
    late, first, middle = (engine.add([own], priority=priority) for own, priority in ((1, 5), (2, -1), (3, 0)))
    engine.run()
    assert [request for request, _ in engine.outputs] == [first, middle, late]


def test_the_least_urgent_is_preempted_first() -> None:
    engine = SimulatedEngine(small_config(total_pages=8, max_model_len=32))
    idle, urgent = engine.add([100] * 8, priority=1, max_tokens=16), engine.add([101] * 8, max_tokens=16)
    while not engine.counters.preemptions:
        engine.step()
    assert [s.request.request_id for s in engine.scheduler.sequences() if s.pages] == [urgent]
    engine.run()
    assert [request for request, _ in sorted(engine.outputs.items(), key=lambda item: item[0])] == [
        (idle, 0),
        (urgent, 0),
    ]
    engine.check_outputs()


def test_who_cannot_run_yet_is_not_passed_by_who_could() -> None:
    engine = SimulatedEngine(small_config(total_pages=10, max_model_len=40))
    engine.add([100] * 20, max_tokens=8)
    engine.step()
    long, short = engine.add([101] * 30, max_tokens=1), engine.add([102], max_tokens=1)
    engine.run()
    order = [request for request, _ in engine.outputs]
    assert order.index(long) < order.index(short)
