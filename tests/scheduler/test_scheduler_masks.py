"""A request with a mask: its rows travel with the plan, and its lane waits until its token is known."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest

from cascade_llm.plan import IntColumn, PageCopy, Tier
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sequence import Request
from tests.scheduler.simulated_engine import SimulatedEngine, every_third


@pytest.mark.parametrize("lag", [0, 1])
def test_every_token_is_one_that_its_mask_allows(lag: int) -> None:
    """The simulated device asserts that each sample's mask is that of the tokens before it."""
    engine = SimulatedEngine(lag=lag)
    masked = engine.add(range(9), max_tokens=9, n=3, temperature=1.0, mask=every_third)
    plain = engine.add(range(9), max_tokens=9)
    plans = engine.run()
    engine.check_outputs()
    for sample in range(3):
        tokens = engine.outputs[masked, sample].token_ids
        for i, token in enumerate(tokens):
            assert every_third(tokens[:i])[token // 32] >> token % 32 & 1
    assert len(engine.outputs[plain, 0].token_ids) == 9
    assert {-1, 0} <= {row for plan in plans for row in plan.sample_mask_rows}
    assert all(not plan.sample_mask_rows for plan in plans if not plan.token_bitmasks)


def test_a_mask_that_several_samples_share_stands_once() -> None:
    engine = SimulatedEngine()
    engine.add(range(9), n=3, temperature=1.0, mask=every_third)
    plan = engine.schedule()
    assert plan is not None
    assert plan.sample_mask_rows.tolist() == [0, 0, 0]
    assert len(plan.token_bitmasks) == 1


def test_a_masked_lane_is_in_every_other_step_where_the_host_runs_ahead() -> None:
    engine = SimulatedEngine(lag=1)
    engine.add(range(9), max_tokens=6, mask=every_third)
    engine.add(range(100, 109), max_tokens=12)
    lanes = [plan.sequence_lanes.tolist() for plan in engine.run()]
    masked_steps = [i for i, each in enumerate(lanes) if 0 in each]
    assert len(masked_steps) == 6
    assert all(later - earlier == 2 for earlier, later in pairwise(masked_steps))
    assert lanes.count([1]) >= 5, "the other one decodes in every step"


def failing_mask(output: Sequence[int]) -> IntColumn:
    if len(output) == 2:
        raise KeyError("no such state")
    return every_third(output)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_mask_that_raises_ends_its_sequence_alone(lag: int) -> None:
    engine = SimulatedEngine(lag=lag)
    broken = engine.add(range(9), max_tokens=9, mask=failing_mask)
    other = engine.add(range(9), max_tokens=9)
    failures = []
    while engine.scheduler.has_unfinished:
        engine.step()
        failures += [update for update in engine.updates if update.failure is not None]
    (update,) = failures
    assert (update.request_id, update.finish_reason) == (broken, "error")
    assert "mask of r0, sample 0, raised KeyError after 2 tokens: 'no such state'" in str(update.failure)
    assert engine.outputs[other, 0] == engine.expected(other)
    assert engine.scheduler.page_counts.held_pages == 0


def test_a_mask_that_raises_at_once_is_the_callers() -> None:
    def broken(output: Sequence[int]) -> IntColumn:
        raise ValueError("an empty grammar")

    with pytest.raises(ValueError, match="an empty grammar"):
        Request(request_id="r", prompt_token_ids=[1], params=SamplingParams(), seed=0, mask=broken)


# tiers


@pytest.mark.parametrize("lag", [0, 1])
def test_copies_between_tiers_go_first_into_the_next_step(lag: int) -> None:
    """A prompt's first page goes to the host, and from there to a free page of the device."""
    engine = SimulatedEngine(lag=lag)
    engine.add(range(12), max_tokens=12)
    first = engine.step()
    assert first is not None
    page, free = engine.page_tables[0][0], 60
    out, back = PageCopy(page, 3, target_tier=Tier.HOST), PageCopy(3, free, source_tier=Tier.HOST)
    engine.scheduler.copy_pages([out])
    assert engine.step().page_copies == (out,)  # type: ignore[union-attr]
    engine.scheduler.copy_pages([back])
    plans = engine.run()
    assert [plan.page_copies for plan in plans].count((back,)) == 1
    engine.check_outputs()
    assert engine.slots_of(page) == engine.slots_of(free) != [None] * 4
    assert (engine.counters.moved_pages, engine.counters.copied_pages) == (2, 0)


def test_copies_inside_the_pool_are_counted_apart() -> None:
    engine = SimulatedEngine()
    engine.add(range(6), n=2, temperature=1.0, max_tokens=4)
    engine.run()
    engine.check_outputs()
    assert (engine.counters.moved_pages, engine.counters.copied_pages) == (0, 1)
