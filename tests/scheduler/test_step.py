"""Lanes; and decode steps made from the one before, against a scheduler that decides each of them anew."""

from __future__ import annotations

from itertools import pairwise

import pytest

from cascade_llm.plan import StepPlan
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.lanes import LanePool
from cascade_llm.scheduler.page_keys import root_key
from cascade_llm.scheduler.sequence import Request, Sequence
from tests.scheduler.generated import RandomLoad, random_engine
from tests.scheduler.simulated_engine import SimulatedEngine, small_config

# lanes


def test_lanes_and_epochs() -> None:
    request = Request(request_id="a", prompt_token_ids=[5, 6], params=SamplingParams(), seed=3)
    first, second, third = (Sequence(request, index, 0, 4, root_key()) for index in range(3))
    lanes = LanePool(2)
    starts = [lanes.enter(first), lanes.enter(second)]
    assert [(start.lane, start.epoch) for start in starts] == [(0, 1), (1, 1)]
    assert lanes.num_free == 0
    lanes.leave(first)
    assert (lanes.num_free, first.epoch) == (1, 0)
    third.token_ids.append(7)
    start = lanes.enter(third)
    assert (start.lane, start.epoch, start.sample_index, start.seed) == (0, 2, 2, 3)
    assert (list(start.prompt_token_ids), list(start.output_token_ids)) == ([5, 6], [7])
    assert start.ending_token_ids is request.ending_token_ids


# runs of decode steps


ROW_COLUMNS = ("token_ids", "positions", "lane_rows", "lane_row_lanes", "sequence_lanes", "sequence_epochs")
SAMPLE_COLUMNS = ("sample_rows", "sample_lanes", "sample_positions")


def continues(plan: StepPlan, before: StepPlan) -> bool:
    return plan.positions is before.sample_positions


def without_page_ids(plan: StepPlan) -> list[object]:
    """All that two schedulers decide alike; which free page comes first depends on the order of asking."""
    columns = [list(getattr(plan, name)) for name in ROW_COLUMNS + SAMPLE_COLUMNS]
    levels = [
        (list(level.qo_indptr), list(level.kv_page_indptr), list(level.kv_last_page_len))
        for cascade in plan.cascades
        for level in cascade.levels
    ]
    return [columns, levels, plan.report, [start.lane for start in plan.lane_starts], len(plan.page_copies)]


FITS_BESIDE_DECODING = (357, 428)
"""Loads with a prompt that fits into the tokens that decoding leaves of a step, and would not into a whole one."""


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 60), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("lag", [0, 1])
def test_plans_are_those_decided_anew(lag: int, seeds: range) -> None:
    num_continued = num_plans = 0
    for seed in (*seeds, *FITS_BESIDE_DECODING):
        engine, rng = random_engine(seed, lag=lag)
        twin, twin_rng = random_engine(seed, lag=lag)
        load, twin_load = RandomLoad(rng, engine.config), RandomLoad(twin_rng, twin.config)
        before = None
        for step in range(40):
            if step % 8 == 0:
                assert load.add_to(engine, 3) == twin_load.add_to(twin, 3)
            twin.scheduler._planner._decode_run = None
            plan, twin_plan = engine.step(), twin.step()
            assert (plan is None) == (twin_plan is None)
            if plan is None or twin_plan is None:
                continue
            assert without_page_ids(plan) == without_page_ids(twin_plan)
            num_plans += 1
            num_continued += before is not None and continues(plan, before)
            before = plan
        assert engine.outputs == twin.outputs
    assert num_continued > num_plans / 5


def test_a_run_goes_on_until_a_sequence_ends() -> None:
    engine = SimulatedEngine()
    for own, max_tokens in ((100, 20), (101, 12)):
        engine.add([1, 2, 3, 4, own], max_tokens=max_tokens)
    plans = engine.run()
    continued = [continues(plan, before) for before, plan in pairwise(plans)]
    # plan 0 is prefill, 1 the first decode step, 12 the first one of a single sequence
    assert continued == [False] + [True] * 10 + [False] + [True] * 7


def test_a_run_ends_when_somebody_comes_or_goes_or_shares_more() -> None:
    engine = SimulatedEngine()
    first = engine.add([1, 2, 3, 4, 100], max_tokens=40)
    engine.add([1, 2, 3, 4, 101], max_tokens=40)
    plans = [engine.step() for _ in range(4)]
    engine.add([1, 2, 3, 4, 102], max_tokens=40)
    plans += [engine.step() for _ in range(4)]
    engine.scheduler.abort(first)
    plans += [engine.step() for _ in range(3)]
    made = [plan for plan in plans if plan is not None]
    continued = [continues(plan, before) for before, plan in pairwise(made)]
    assert continued == [False, True, True, False, False, True, True, False, True, True]


def test_a_waiting_request_that_does_not_fit_does_not_end_a_run() -> None:
    engine = SimulatedEngine(small_config(max_num_seqs=1))
    engine.add([1, 2, 3], max_tokens=10)
    engine.add([4, 5, 6], max_tokens=2)
    plans = engine.run()
    assert sum(continues(plan, before) for before, plan in pairwise(plans)) == 8
    engine.check_outputs()


def test_a_run_ends_when_pages_are_short() -> None:
    engine = SimulatedEngine(small_config(total_pages=32, max_num_seqs=4))
    for own in range(4):
        engine.add([own] * 8, max_tokens=60)
    engine.run()
    assert engine.counters.preemptions
    engine.check_outputs()
