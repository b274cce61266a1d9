"""What a sequence is and what ends it."""

from __future__ import annotations

from typing import Any

from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.page_keys import root_key
from cascade_llm.scheduler.sequence import Request, Sequence


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
