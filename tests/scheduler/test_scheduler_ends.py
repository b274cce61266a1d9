"""How sequences end: by count, by a token, by abort, by failure; and what is left of them."""

from __future__ import annotations

from typing import Any

import pytest

from cascade_llm.plan import StepResult
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sequence import Request
from tests.scheduler.simulated_engine import Output, SimulatedEngine, expected_output, small_config

SYSTEM = list(range(8))
PROMPT = [1, 2, 3]


def output_of(**params: Any) -> Output:
    """What the first request of an engine makes of its draws, which are the same each time."""
    engine = SimulatedEngine()
    request = engine.add(PROMPT, **{"max_tokens": 6, **params})
    engine.run()
    engine.check_outputs()
    return engine.outputs[request, 0]


FREE = Request(request_id="r0", prompt_token_ids=PROMPT, params=SamplingParams(max_tokens=6), seed=0)
DRAWS = expected_output(FREE, 0, max_model_len=128, vocab_size=1000).token_ids
assert len(set(DRAWS)) == 6


@pytest.mark.parametrize(
    ("params", "count", "reason", "stop_token_id"),
    [
        ({}, 6, "length", None),
        ({"max_tokens": 1}, 1, "length", None),
        ({"ending": [DRAWS[2]]}, 3, "stop", None),
        ({"ending": [DRAWS[0]]}, 1, "stop", None),
        ({"ending": [DRAWS[2], DRAWS[1]]}, 2, "stop", None),
        ({"ending": [DRAWS[2]], "ignore_eos": True}, 6, "length", None),
        ({"stop_token_ids": [DRAWS[3]]}, 4, "stop", DRAWS[3]),
        ({"stop_token_ids": [DRAWS[3]], "ignore_eos": True, "ending": [DRAWS[1]]}, 4, "stop", DRAWS[3]),
        ({"stop_token_ids": [DRAWS[2]], "ending": [DRAWS[2]]}, 3, "stop", DRAWS[2]),
        ({"ending": [DRAWS[2]], "max_tokens": 3}, 3, "stop", None),
        ({"ending": [DRAWS[2]], "min_tokens": 2}, 3, "stop", None),
        ({"ending": [DRAWS[2]], "min_tokens": 3}, 6, "length", None),
        ({"ending": [DRAWS[2], DRAWS[4]], "min_tokens": 3}, 5, "stop", None),
        ({"stop_token_ids": [DRAWS[2]], "min_tokens": 3}, 6, "length", None),
    ],
)
def test_an_end_by_count_or_token(params: dict[str, Any], count: int, reason: str, stop_token_id: int | None) -> None:
    assert output_of(**params) == Output(DRAWS[:count], reason, stop_token_id)


@pytest.mark.parametrize("lag", [0, 1])
def test_the_context_ends_at_max_model_len(lag: int) -> None:
    engine = SimulatedEngine(small_config(max_model_len=16), lag=lag)
    longest, half = engine.add(range(15), max_tokens=50), engine.add([100] * 10, max_tokens=50)
    engine.run()
    assert len(engine.outputs[longest, 0].token_ids) == 1
    assert len(engine.outputs[half, 0].token_ids) == 6
    assert {output.finish_reason for output in engine.outputs.values()} == {"length"}
    engine.check_outputs()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("num_steps", range(7))
def test_an_abort_at_any_stage_gives_everything_back(num_steps: int, lag: int) -> None:
    """Waiting, in a chunk, at the end of the prompt, while it generates, when it has ended."""
    engine = SimulatedEngine(small_config(max_num_batched_tokens=12, max_num_seqs=4), lag=lag)
    other = engine.add([*SYSTEM, 50], max_tokens=3)
    aborted = engine.add([*SYSTEM, *range(100, 112)], n=6, max_tokens=3)
    for _ in range(num_steps):
        engine.step()
    engine.scheduler.abort(aborted)
    engine.scheduler.abort(aborted)
    engine.check()
    assert all(s.request.request_id == other for s in engine.scheduler.sequences())
    engine.run()
    assert engine.outputs[other, 0] == engine.expected(other)
    assert engine.scheduler.page_counts.held_pages == 0
    assert engine.counters.finished_requests == 2
    engine.scheduler.abort("never heard of it")


def test_a_preempted_request_can_be_aborted() -> None:
    engine = SimulatedEngine(small_config(total_pages=8, max_model_len=32))
    old, young = (engine.add([own] * 8, max_tokens=16) for own in (100, 101))
    while not engine.counters.preemptions:
        engine.step()
    engine.scheduler.abort(young)
    engine.run()
    assert engine.outputs[old, 0] == engine.expected(old)
    assert engine.outputs[young, 0].finish_reason is None


def test_an_id_can_be_used_again_when_its_request_has_ended() -> None:
    engine = SimulatedEngine(lag=1)
    request = engine.requests[engine.add(PROMPT)]
    engine.step()
    engine.scheduler.abort(request.request_id)
    engine.scheduler.add(request)
    engine.run()
    engine.check_outputs()


def test_a_failed_sample_ends_alone_and_its_pages_are_forgotten() -> None:
    engine = SimulatedEngine()
    failed, other = (engine.add([*SYSTEM, own, *SYSTEM]) for own in (100, 101))
    engine.schedule()
    engine.commit(failed_samples=frozenset({0}))
    error, token = engine.updates
    assert (error.request_id, error.finish_reason, error.token_id) == (failed, "error", None)
    assert (token.request_id, token.finish_reason) == (other, None)
    assert engine.scheduler.page_counts.cached_pages == 0
    assert engine.scheduler.page_counts.held_pages == 5, "the other one's, which shares two of them"
    engine.run()
    assert engine.outputs[other, 0] == engine.expected(other)


def test_samples_fail_one_by_one() -> None:
    engine = SimulatedEngine()
    request = engine.add(SYSTEM, n=3)
    engine.schedule()
    engine.commit(failed_samples=frozenset({1}))
    engine.run()
    assert engine.outputs[request, 1] == Output(finish_reason="error")
    for sample in (0, 2):
        assert engine.outputs[request, sample] == engine.expected(request, sample)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_failed_step_ends_its_sequences_and_the_waiting_go_on(lag: int) -> None:
    engine = SimulatedEngine(small_config(max_num_seqs=2), lag=lag)
    first, second, waiting = (engine.add([*SYSTEM, own]) for own in (100, 101, 102))
    for _ in range(lag + 1):
        engine.schedule()
    engine.fail()
    assert {(u.request_id, u.finish_reason) for u in engine.updates} == {(first, "error"), (second, "error")}
    assert engine.scheduler.num_in_flight == 0
    assert engine.scheduler.page_counts.free_pages == 64, "nothing of it is left in the tree"
    engine.run()
    assert engine.outputs[waiting, 0] == engine.expected(waiting)


@pytest.mark.parametrize("num_followers", [0, 1])
def test_a_failed_step_also_takes_the_prefixes_of_those_that_were_aborted_meanwhile(num_followers: int) -> None:
    engine = SimulatedEngine()
    aborted = [engine.add([*SYSTEM, *range(own, own + 8)]) for own in range(100, 120 + 20 * num_followers, 20)]
    failed = engine.add([50] * 9)
    engine.schedule()
    for request in aborted:
        engine.scheduler.abort(request)
    engine.fail()
    assert [u.request_id for u in engine.updates] == [failed]
    again = engine.add([*SYSTEM, *range(100, 108), 1])
    engine.run()  # the device would notice pages that were never filled
    assert engine.outputs[again, 0] == engine.expected(again)
    assert engine.counters.cached_tokens == 8 * num_followers


def test_a_sequence_that_runs_but_is_not_in_the_failed_step_starts_again() -> None:
    engine = SimulatedEngine(small_config(total_pages=8, max_model_len=32), lag=1)
    old, young = engine.add([100] * 13, max_tokens=8), engine.add([101] * 12, max_tokens=8)
    plan = engine.step()
    while plan is not None and plan.num_sequences == 2:
        plan = engine.step()  # until the old one needs a page that is not there
    assert engine.scheduler.num_running == 2
    engine.fail()
    assert [u.request_id for u in engine.updates] == [young]
    assert engine.counters.preemptions == 1
    engine.run()
    assert engine.outputs[old, 0] == engine.expected(old)


def test_results_must_answer_the_oldest_step_in_flight() -> None:
    engine = SimulatedEngine()
    engine.add(PROMPT)
    engine.add([9])
    first = engine.schedule()
    second = engine.schedule()
    assert first is not None
    assert second is not None
    with pytest.raises(AssertionError):
        engine.scheduler.commit(second, StepResult(step_id=second.step_id, token_ids=[5, 6]))
