"""Prompts: what is computed, what is found, and who waits for whom."""

from __future__ import annotations

import pytest

from tests.scheduler.simulated_engine import SimulatedEngine, small_config

SYSTEM = list(range(8))


def rows_of(engine: SimulatedEngine) -> list[int]:
    """Rows of each step until everything has ended."""
    rows = [plan.num_rows for plan in engine.run()]
    engine.check_outputs()
    return rows


@pytest.mark.parametrize(
    ("prompt_len", "matched_len"), [(1, 0), (3, 0), (4, 0), (5, 4), (7, 4), (8, 4), (9, 8), (12, 8), (13, 12)]
)
def test_a_prompt_that_is_cached_is_computed_from_the_last_page_boundary_before_its_end(
    prompt_len: int, matched_len: int
) -> None:
    engine = SimulatedEngine()
    engine.add(range(prompt_len), max_tokens=1)
    assert rows_of(engine) == [prompt_len]
    before = engine.scheduler.page_counts.cached_pages
    again = engine.add(range(prompt_len), max_tokens=1)
    assert rows_of(engine) == [prompt_len - matched_len]
    assert engine.updates[-1].request_id == again
    assert engine.updates[-1].num_cached_tokens == matched_len
    assert engine.counters.cached_tokens == matched_len
    assert engine.counters.prefilled_tokens == 2 * prompt_len - matched_len
    assert engine.scheduler.page_counts.cached_pages == before, "a page that exists is not kept twice"


def test_a_generated_text_is_cached_for_the_next_turn() -> None:
    engine = SimulatedEngine()
    first = engine.add(SYSTEM, max_tokens=9)
    engine.run()
    answer = engine.outputs[first, 0].token_ids
    engine.add([*SYSTEM, *answer, 50], max_tokens=1)
    engine.run()
    assert engine.updates[-1].num_cached_tokens == 16, "8 + 9 tokens, the last of which has no K/V"


def test_a_prompt_beyond_the_budget_is_computed_in_chunks() -> None:
    engine = SimulatedEngine(small_config(max_num_batched_tokens=10))
    engine.add(range(34), max_tokens=3)
    assert rows_of(engine) == [10, 10, 10, 4, 1, 1]
    assert engine.counters.prefilled_tokens == 34
    assert engine.counters.generated_tokens == 3


def test_chunks_leave_every_running_sequence_a_token() -> None:
    engine = SimulatedEngine(small_config(max_num_batched_tokens=10))
    for own in (100, 200):
        engine.add([own], max_tokens=9)
    engine.step()
    engine.add(range(20), max_tokens=2)
    plans = [engine.step() for _ in range(4)]
    assert [[len(p.cascade.leaf.rows(i)) for i in range(3)] for p in plans if p] == [
        [1, 1, 8],
        [1, 1, 8],
        [1, 1, 4],
        [1] * 3,
    ]
    engine.run()
    engine.check_outputs()


def test_sixty_four_requests_behind_one_prefix_compute_it_once_and_in_one_step() -> None:
    shared_len, own_len = 2048, 20
    config = small_config(
        page_size=16, total_pages=512, max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=8192
    )
    engine = SimulatedEngine(config)
    for own in range(64):
        engine.add([*range(shared_len), *[5000 + own] * own_len], max_tokens=2)
    plan = engine.step()
    assert plan is not None
    assert plan.num_sequences == 64
    assert plan.num_rows == engine.counters.prefilled_tokens == shared_len + 64 * own_len
    assert engine.counters.cached_tokens == 63 * shared_len
    assert (plan.report.num_groups, plan.report.grouped_rows) == (1, 63 * own_len)
    plan = engine.step()
    assert plan is not None
    assert plan.report.kv_tokens_read == shared_len + 64 * (own_len + 1)
    assert not engine.scheduler.has_unfinished
    engine.check_outputs()


@pytest.mark.parametrize("budget", [64, 500, 2048, 2060])
def test_a_prefix_is_computed_once_whatever_the_budget(budget: int) -> None:
    shared_len, own_len = 2048, 20
    config = small_config(
        page_size=16, total_pages=512, max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=budget
    )
    engine = SimulatedEngine(config)
    for own in range(64):
        engine.add([*range(shared_len), *[5000 + own] * own_len], max_tokens=1)
    rows = rows_of(engine)
    assert engine.counters.prefilled_tokens == sum(rows) == shared_len + 64 * own_len
    assert len(rows) == -(-sum(rows) // budget), "no step has room to spare but the last"


def test_followers_wait_only_for_what_the_budget_leaves_to_a_later_step() -> None:
    engine = SimulatedEngine(small_config(max_num_batched_tokens=20))
    for own in (100, 101):
        engine.add([*range(32), own, own, own])
    first, second = engine.step(), engine.step()
    assert first is not None
    assert second is not None
    assert (first.num_sequences, first.num_rows) == (1, 20)
    assert [len(second.cascade.leaf.rows(i)) for i in range(2)] == [15, 3], "the follower meets what the leader fills"
    assert engine.counters.cached_tokens == 32


@pytest.mark.parametrize("lag", [0, 1])
def test_when_the_leader_dies_the_next_follower_leads_from_where_it_was(lag: int) -> None:
    engine = SimulatedEngine(small_config(max_num_batched_tokens=20), lag=lag)
    leader, *_ = (engine.add([*range(32), own, own, own]) for own in (100, 101, 102))
    engine.step()
    engine.scheduler.abort(leader)
    plan = engine.step()
    assert plan is not None
    assert list(plan.positions)[:15] == list(range(20, 35))
    assert plan.num_sequences == 2
    assert engine.counters.prefilled_tokens == 35 + 3
    engine.run()
    del engine.requests[leader]
    engine.check_outputs()


def test_a_leader_that_dies_before_it_ran_leaves_its_followers_nothing_to_redo() -> None:
    engine = SimulatedEngine(lag=1)
    leader, follower = (engine.add([*range(32), own]) for own in (100, 101))
    engine.schedule()
    engine.scheduler.abort(leader)
    engine.run()
    assert engine.counters.prefilled_tokens == 33 + 1
    assert engine.outputs == {(follower, 0): engine.expected(follower)}


def test_requests_of_another_salt_share_nothing() -> None:
    engine = SimulatedEngine()
    for salt in (b"", b"one", b"two", b"one"):
        engine.add([*SYSTEM, 9], salt=salt)
    plan = engine.step()
    assert plan is not None
    assert sorted(len(plan.cascade.leaf.rows(i)) for i in range(4)) == [1, 9, 9, 9]
    pages = [set(table) for table in engine.page_tables]
    assert sorted(len(a & b) for i, a in enumerate(pages) for b in pages[:i]) == [0, 0, 0, 0, 0, 2]


def test_salts_and_request_ids_do_not_run_together() -> None:
    """Without prefix caching the request's id is a salt too."""
    engine = SimulatedEngine(small_config(enable_prefix_caching=False))
    engine.add([*SYSTEM, 9], request_id="b1", salt=b"a")
    engine.add([*SYSTEM, 9], request_id="1", salt=b"ab")
    plan = engine.step()
    assert plan is not None
    assert plan.num_rows == 9 + 9


def test_without_prefix_caching_requests_share_nothing_and_samples_do() -> None:
    engine = SimulatedEngine(small_config(enable_prefix_caching=False))
    engine.add([*SYSTEM, 9], n=2)
    engine.add([*SYSTEM, 9])
    plan = engine.step()
    assert plan is not None
    assert (plan.num_rows, plan.report.num_groups) == (18, 0)
    plan = engine.step()
    assert plan is not None
    assert (plan.num_rows, plan.report.num_groups, plan.report.grouped_rows) == (3, 1, 2)
    engine.run()
    assert engine.scheduler.page_counts.cached_pages == 0
    engine.check_outputs()


def test_resetting_the_prefix_cache_forgets_what_nobody_holds() -> None:
    engine = SimulatedEngine()
    engine.add(SYSTEM, max_tokens=1)
    engine.run()
    engine.add([100] * 9, max_tokens=4)
    engine.step()
    assert engine.scheduler.page_counts.cached_pages == 2
    engine.scheduler.reset_prefix_cache()
    engine.check()
    assert engine.scheduler.page_counts.cached_pages == 0
    assert engine.scheduler.page_counts.held_pages == 3
    engine.run()
    engine.check_outputs()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("budget", [4, 7, 64])
def test_prompt_logprobs_are_reported_once_each_across_chunks(budget: int, lag: int) -> None:
    engine = SimulatedEngine(small_config(max_num_batched_tokens=budget, max_num_seqs=4), lag=lag)
    engine.add(range(21), max_tokens=1)
    engine.run()
    counts = []
    engine.add(range(21), max_tokens=3, prompt_logprobs=5, n=2)
    engine.add([1], max_tokens=2, prompt_logprobs=0)
    for plan in engine.run():
        counts += list(plan.prompt_logprob_counts)
    assert counts == [5] * 20, "though its pages are cached"
    engine.check_outputs()


def test_prompt_logprobs_are_reported_once_each_across_a_preemption() -> None:
    engine = SimulatedEngine(small_config(total_pages=16, max_model_len=64, max_num_batched_tokens=10))
    for own in range(4):
        engine.add([100 + own] * 8, max_tokens=20)
    for _ in range(4):
        engine.step()
    reporting = engine.add(range(40), max_tokens=5, prompt_logprobs=0)
    lengths = set()
    for _ in range(200):
        engine.step()
        lengths.add(len(engine.outputs[reporting, 0].prompt_logprobs) if (reporting, 0) in engine.outputs else 0)
    assert engine.counters.recomputed_tokens > 0
    assert {0, 39} < lengths, "in parts"
    engine.check_outputs()
