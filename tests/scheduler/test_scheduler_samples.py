"""n samples of one prompt: it is computed once, and they part by copying at most one page each."""

from __future__ import annotations

import pytest

from tests.scheduler.simulated_engine import SimulatedEngine, small_config


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("prompt_len", "num_copies"), [(6, 3), (7, 3), (8, 0), (9, 3)])
def test_one_prefill_and_four_samples_of_its_last_row(prompt_len: int, num_copies: int, lag: int) -> None:
    engine = SimulatedEngine(lag=lag)
    engine.add(range(prompt_len), n=4, max_tokens=3)
    first, second = engine.step(), engine.step()
    assert first is not None
    assert second is not None
    assert (first.num_rows, first.num_sequences, first.page_copies) == (prompt_len, 1, ())
    assert list(first.sample_rows) == [prompt_len - 1] * 4
    assert sorted(first.sample_lanes) == [0, 1, 2, 3]
    assert [start.sample_index for start in first.lane_starts] == [0, 1, 2, 3]
    assert (second.num_rows, len(second.page_copies)) == (4, num_copies)
    assert engine.counters.prefilled_tokens == prompt_len
    engine.run()
    engine.check_outputs()
    assert len({tuple(output.token_ids) for output in engine.outputs.values()}) == 4, "each has its own draws"


@pytest.mark.parametrize("lag", [0, 1])
def test_more_samples_than_lanes(lag: int) -> None:
    engine = SimulatedEngine(small_config(max_num_seqs=2), lag=lag)
    engine.add(range(10), n=5, max_tokens=3)
    later = engine.add([100], max_tokens=1)
    engine.step()
    assert engine.scheduler.num_running == 2
    assert engine.scheduler.num_waiting == 3 + 1
    engine.run()
    engine.check_outputs()
    assert list(engine.outputs)[-1] == (later, 0), "samples wait before later requests"
    assert engine.counters.prefilled_tokens == 10 + 3 * 2 + 1, "the others find the full pages of the prompt"


@pytest.mark.parametrize("lag", [0, 1])
def test_samples_that_follow_other_requests_share_with_them(lag: int) -> None:
    engine = SimulatedEngine(lag=lag)
    for own in (100, 101):
        engine.add([*range(8), own], n=3, max_tokens=6)
    first = engine.step()
    assert first is not None
    assert first.num_rows == 9 + 1
    assert sorted(first.sample_rows) == [0, 0, 0, 9, 9, 9] or sorted(first.sample_rows) == [8, 8, 8, 9, 9, 9]
    second = engine.step()
    assert second is not None
    assert (second.num_rows, second.report.grouped_rows) == (6, 6)
    engine.run()
    engine.check_outputs()


def test_a_chunked_prompt_forks_at_its_end() -> None:
    engine = SimulatedEngine(small_config(max_num_batched_tokens=8))
    engine.add(range(20), n=3, max_tokens=2)
    assert [len(plan.sample_rows) for plan in engine.run()] == [0, 0, 3, 3]
    engine.check_outputs()


def test_one_sample_can_end_by_its_text_while_others_go_on() -> None:
    engine = SimulatedEngine()
    request = engine.add(range(6), n=3, max_tokens=6)
    engine.step()
    engine.scheduler.finish(request, 1, "stop")
    engine.check()
    engine.run()
    assert engine.outputs[request, 1].token_ids == engine.expected(request, 1).token_ids[:1]
    for sample in (0, 2):
        assert engine.outputs[request, sample] == engine.expected(request, sample)


def test_equal_samples_come_together_again() -> None:
    engine = SimulatedEngine()
    engine.add(range(6), n=3, max_tokens=12, temperature=0.0)
    plans = engine.run()
    assert engine.scheduler.page_counts.cached_pages == 4, "6 + 11 tokens, once"
    assert plans[-1].report.kv_tokens_saved == 2 * 16
    engine.check_outputs()
