"""One step is planned while another is in flight: tokens that nobody knows yet, rows that are too many."""

from __future__ import annotations

import pytest

from tests.scheduler.simulated_engine import SimulatedEngine, small_config


def test_tokens_in_flight_are_read_from_their_lanes() -> None:
    engine = SimulatedEngine(lag=1)
    engine.add([5, 6], max_tokens=4)
    engine.add([7], max_tokens=4)
    first, second = engine.schedule(), engine.schedule()
    assert first is not None
    assert second is not None
    assert (list(first.token_ids), list(first.lane_rows)) == ([5, 6, 7], [])
    assert (list(second.token_ids), list(second.lane_rows), list(second.lane_row_lanes)) == ([0, 0], [0, 1], [0, 1])
    assert list(second.positions) == [2, 1]
    engine.commit()
    engine.run()
    engine.check_outputs()


def test_committed_tokens_are_sent_by_the_host() -> None:
    engine = SimulatedEngine(lag=0)
    request = engine.add([5, 6], max_tokens=4)
    plans = engine.run()
    assert [list(plan.token_ids) for plan in plans[1:]] == [[t] for t in engine.outputs[request, 0].token_ids[:3]]
    assert all(len(plan.lane_rows) == 0 for plan in plans)


@pytest.mark.parametrize("lag", [0, 1])
def test_an_end_by_count_is_never_over_run(lag: int) -> None:
    engine = SimulatedEngine(small_config(max_model_len=16), lag=lag)
    engine.add([5], max_tokens=3)
    engine.add([6] * 14, max_tokens=9)
    plans = engine.run()
    assert sum(len(plan.sample_rows) for plan in plans) == 3 + 2
    assert sum(plan.num_rows for plan in plans) == 1 + 2 + 14 + 1
    engine.check_outputs()


def test_rows_planned_past_an_end_by_token_are_dropped() -> None:
    draws = SimulatedEngine()
    draws.add([5, 6], max_tokens=5)
    draws.run()
    ending = draws.outputs["r0", 0].token_ids[2]

    engine = SimulatedEngine(lag=1)
    request = engine.add([5, 6], max_tokens=5, ending=[ending])
    plans = engine.run()
    assert sum(len(plan.sample_rows) for plan in plans) == 4, "one too many"
    assert engine.outputs[request, 0] == engine.expected(request)
    assert engine.counters.generated_tokens == 3
    assert engine.scheduler.page_counts.cached_pages == 1, "2 + 2 tokens"


def test_nobody_is_preempted_while_a_step_is_in_flight() -> None:
    engine = SimulatedEngine(small_config(total_pages=8, max_model_len=32), lag=1)
    for own in range(4):
        engine.add([100 + own] * 8, max_tokens=16)
    while engine.scheduler.has_unfinished:
        before, num_in_flight = engine.counters.preemptions, engine.scheduler.num_in_flight
        engine.schedule()
        assert engine.counters.preemptions == before or num_in_flight == 0
        if len(engine.pending) > 1 or num_in_flight == len(engine.pending) == 1:
            engine.commit()
    assert engine.counters.preemptions > 0
    engine.check_outputs()


def test_a_lane_is_given_on_while_its_old_rows_are_in_flight() -> None:
    engine = SimulatedEngine(small_config(max_num_seqs=1), lag=1)
    first, second = engine.add([5], max_tokens=9), engine.add([6], max_tokens=2)
    engine.schedule()
    engine.schedule()
    engine.scheduler.abort(first)
    plan = engine.schedule()
    assert plan is not None
    assert [(start.lane, start.epoch) for start in plan.lane_starts] == [(0, 2)]
    for _ in range(2):
        assert engine.commit() == [], "results of the old use"
    engine.run()
    assert engine.outputs == {(second, 0): engine.expected(second)}


def test_pages_are_given_on_while_old_rows_are_in_flight() -> None:
    engine = SimulatedEngine(small_config(total_pages=4, max_model_len=16), lag=1)
    first = engine.add([5] * 10, max_tokens=9)
    engine.schedule()
    engine.schedule()
    engine.scheduler.abort(first)
    second = engine.add([6] * 13, max_tokens=3)
    engine.run()
    assert engine.outputs[second, 0] == engine.expected(second)


def test_what_is_generated_is_the_same_at_any_lag() -> None:
    outputs = []
    for lag in (0, 1):
        engine = SimulatedEngine(small_config(total_pages=24, max_model_len=64), lag=lag)
        for own in range(6):
            engine.add([*range(8), 100 + own], n=2, max_tokens=20, ending=range(50))
        engine.run()
        engine.check_outputs()
        outputs.append(engine.outputs)
    assert outputs[0] == outputs[1]
