"""Proposed tokens: several rows and samples of one lane, of which a commit keeps those that the model drew itself."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from cascade_llm.plan import StepPlan
from cascade_llm.scheduler.sequence import Sequence
from tests.scheduler.simulated_engine import SimulatedEngine, every_third, small_config


class Oracle:
    """Proposes what the sequence will draw, and behind `num_right` such tokens a wrong one."""

    def __init__(self, num_right: int, most: int = 4) -> None:
        self.num_right, self.most = num_right, most
        self.engine: SimulatedEngine | None = None
        self.asked: list[int] = []

    def __call__(self, sequence: Sequence, most: int) -> Iterable[int]:
        self.asked.append(most)
        assert self.engine is not None
        expected = self.engine.expected(sequence.request.request_id, sequence.sample_index).token_ids
        known = len(sequence.token_ids) - sequence.prompt_len
        right = expected[known : known + self.num_right]
        return [*right, *[999] * (self.most - len(right))][: self.most]


def drafting_engine(num_right: int, *, lag: int = 0, most: int = 4, **config: int) -> SimulatedEngine:
    oracle = Oracle(num_right, most)
    oracle.engine = engine = SimulatedEngine(small_config(**config), lag=lag, drafter=oracle)
    return engine


def drafts_of(plans: Iterable[StepPlan]) -> list[list[int]]:
    return [plan.draft_lens.tolist() for plan in plans]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("num_right", [0, 1, 2, 4])
def test_the_text_is_that_without_drafts(num_right: int, lag: int) -> None:
    engine = drafting_engine(num_right, lag=lag)
    for i in range(3):
        engine.add(range(10 + i), max_tokens=20, n=1 + i, temperature=i % 2)
    plans = engine.run()
    engine.check_outputs()
    assert any(map(len, drafts_of(plans)))
    counters = engine.counters
    assert counters.generated_tokens == 20 * 6
    assert (counters.accepted_tokens == 0) == (num_right == 0)
    assert counters.accepted_tokens <= counters.drafted_tokens


def test_a_drafting_step_in_columns() -> None:
    """A prompt of 6, its first token drawn plainly, then 4 tokens proposed of which 2 are right."""
    engine = drafting_engine(2)
    engine.add(range(6), max_tokens=12)
    engine.step()
    expected = engine.expected("r0").token_ids
    plan = engine.step()
    assert plan is not None
    assert plan.token_ids.tolist() == [expected[0], expected[1], expected[2], 999, 999]
    assert plan.positions.tolist() == [6, 7, 8, 9, 10]
    assert plan.sample_rows.tolist() == [0, 1, 2, 3, 4]
    assert plan.sample_positions.tolist() == [7, 8, 9, 10, 11]
    assert (plan.draft_samples.tolist(), plan.draft_lens.tolist()) == ([0], [4])
    assert [update.token_id for update in engine.updates] == expected[1:4]
    (sequence,) = engine.scheduler.sequences()
    assert (sequence.planned_len, sequence.committed_len, sequence.total_len) == (9, 9, 10)
    assert len(sequence.pages) == 3, "the page behind position 9 was given back"
    assert (engine.counters.drafted_tokens, engine.counters.accepted_tokens) == (4, 2)


def test_pages_behind_what_was_accepted_are_given_back() -> None:
    engine = drafting_engine(0, most=9)
    engine.add(range(7), max_tokens=20)
    engine.step()
    held = engine.scheduler.page_counts.held_pages
    plan = engine.schedule()
    assert plan is not None
    assert engine.scheduler.page_counts.held_pages == held + 3
    engine.commit()
    assert engine.scheduler.page_counts.held_pages == held


def test_what_was_accepted_is_published_and_found_by_others() -> None:
    engine = drafting_engine(4)
    first = engine.add(range(7), max_tokens=13)
    engine.run()
    text = [*range(7), *engine.outputs[first, 0].token_ids]
    again = engine.add([*text, 5])
    engine.run()
    assert engine.scheduler.counters.cached_tokens == 16, "four full pages of 19 tokens with K/V"
    assert engine.outputs[again, 0].finish_reason == "length"


def test_a_drafting_lane_waits_for_its_count_and_others_go_on() -> None:
    """With a lag of 1, a lane is in every other step: prompts come in between, else no step is planned."""
    engine = drafting_engine(1, lag=1)
    engine.add(range(5), max_tokens=12)
    lanes = []
    while engine.scheduler.has_unfinished:
        plan = engine.step()
        lanes.append(plan.sequence_lanes.tolist() if plan else None)
        if len(lanes) == 3:
            engine.add(range(100, 105), max_tokens=2, mask=every_third)
    engine.check_outputs()
    assert lanes[:5] == [[0], None, [0], [1], [0]]


@pytest.mark.parametrize("lag", [0, 1])
def test_an_end_inside_accepted_tokens(lag: int) -> None:
    """What comes after the ending token is neither counted nor published."""
    engine = drafting_engine(4, lag=lag)
    engine.add(range(6), max_tokens=30, temperature=0)
    ending = engine.expected("r0").token_ids[3]
    engine.add(range(6), max_tokens=30, temperature=0, stop_token_ids=[ending])
    engine.run()
    engine.check_outputs()
    assert engine.outputs["r1", 0].finish_reason == "stop"
    assert engine.counters.generated_tokens == 30 + 4
    assert engine.scheduler.page_counts.held_pages == 0


def test_no_draft_goes_beyond_max_tokens_or_the_context() -> None:
    engine = drafting_engine(4)
    engine.add(range(6), max_tokens=3)
    engine.add(range(10, 130 - 8), max_tokens=50)
    plans = engine.run()
    engine.check_outputs()
    assert max(plan.sample_positions[-1] for plan in plans if len(plan.sample_positions)) < 128
    assert [1] in drafts_of(plans), "two tokens are left to r0, so one is proposed"


def test_drafts_leave_each_later_sequence_a_token() -> None:
    engine = drafting_engine(0, max_num_seqs=4, max_num_batched_tokens=6)
    for i in range(4):
        engine.add(range(100 * i, 100 * i + 3), max_tokens=10)
    plans = engine.run()
    engine.check_outputs()
    assert all(plan.num_rows <= 6 for plan in plans)
    assert plans[1].num_sequences == 4, "prompts come before drafts"
    together = [plan for plan in plans if plan.num_sequences == 4 and len(plan.draft_lens)]
    assert together
    assert [2] in drafts_of(together)
    assert all(sum(lens) <= 2 for lens in drafts_of(together))


def test_without_pages_for_a_draft_the_sequence_decodes_plainly() -> None:
    engine = drafting_engine(4, most=8, total_pages=4, max_model_len=16)
    engine.add(range(6), max_tokens=10)
    engine.run()
    engine.check_outputs()
    assert engine.counters.preemptions == 0


def test_a_failed_sample_among_the_accepted_ends_the_sequence() -> None:
    engine = drafting_engine(2)
    engine.add(range(6), max_tokens=12)
    engine.step()
    engine.schedule()
    updates = engine.commit(frozenset({1}))
    assert [update.finish_reason for update in updates] == [None, "error"]
    assert engine.scheduler.page_counts.held_pages == 0


def test_a_failed_sample_behind_the_accepted_means_nothing() -> None:
    engine = drafting_engine(1)
    engine.add(range(6), max_tokens=12)
    engine.step()
    engine.schedule()
    assert all(update.finish_reason is None for update in engine.commit(frozenset({3, 4})))
    engine.run()
    engine.check_outputs()


def test_an_abort_while_a_draft_is_in_flight() -> None:
    engine = drafting_engine(4, lag=1)
    engine.add(range(6), max_tokens=12)
    engine.step()
    engine.step()
    while not engine.pending or not len(engine.pending[-1].draft_lens):
        engine.step()
    engine.scheduler.abort("r0")
    assert engine.commit() == []
    assert engine.scheduler.page_counts.held_pages == 0
