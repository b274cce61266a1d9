"""Sampling parameters: every range, every message, and what is normalized."""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.errors import RequestError, SamplingParamsError
from cascade_llm.sampling_params import SamplingParams


def test_defaults() -> None:
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.n, params.top_k, params.top_p) == (1.0, 256, 1, 0, 1.0)
    assert not params.greedy
    assert (params.stop, params.stop_token_ids, params.logit_bias) == ((), (), {})


ALLOWED: list[tuple[str, Any]] = [
    ("temperature", 0),
    ("temperature", 0.0),
    ("temperature", 1e-300),
    ("temperature", 100.0),
    ("top_k", 0),
    ("top_k", -1),
    ("top_k", 10**6),
    ("top_p", 1),
    ("top_p", 1e-9),
    ("min_p", 0),
    ("min_p", 1.0),
    ("presence_penalty", -2.0),
    ("presence_penalty", 2),
    ("frequency_penalty", -2),
    ("frequency_penalty", 2.0),
    ("repetition_penalty", 1e-3),
    ("repetition_penalty", 3),
    ("logit_bias", {0: -100, 7: 0.5}),
    ("logit_bias", {}),
    ("seed", -(2**63)),
    ("seed", 2**63 - 1),
    ("n", 1),
    ("n", 64),
    ("max_tokens", 1),
    ("min_tokens", 0),
    ("min_tokens", 256),
    ("stop", "END"),
    ("stop", ["a", "b"]),
    ("stop_token_ids", [0, 5]),
    ("logprobs", 0),
    ("prompt_logprobs", 20),
]


@pytest.mark.parametrize(("name", "value"), ALLOWED)
def test_allowed(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) is not None


REFUSED: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, r"0 or larger \(0 is greedy\)"),
    ("temperature", math.nan, "0 or larger"),
    ("temperature", math.inf, "0 or larger"),
    ("temperature", "1", "0 or larger"),
    ("temperature", True, "0 or larger"),
    ("temperature", None, "0 or larger"),
    ("top_k", -2, r"an integer, 0 \(all\) or larger"),
    ("top_k", 1.5, "an integer"),
    ("top_p", 0, r"in \(0, 1\]"),
    ("top_p", 1.01, r"in \(0, 1\]"),
    ("top_p", math.nan, r"in \(0, 1\]"),
    ("min_p", -0.1, r"in \[0, 1\]"),
    ("min_p", 1.1, r"in \[0, 1\]"),
    ("presence_penalty", 2.1, r"in \[-2, 2\]"),
    ("frequency_penalty", -2.1, r"in \[-2, 2\]"),
    ("repetition_penalty", 0, "above 0"),
    ("repetition_penalty", math.inf, "above 0"),
    ("n", 0, "1 or larger"),
    ("n", 2.0, "an integer"),
    ("n", True, "an integer"),
    ("max_tokens", 0, "1 or larger"),
    ("max_tokens", "many", "an integer"),
    ("max_tokens", None, "an integer"),
    ("min_tokens", -1, "between 0 and max_tokens"),
    ("min_tokens", 257, "between 0 and max_tokens"),
    ("seed", 2**63, r"in \[-2\*\*63, 2\*\*63\)"),
    ("seed", 0.5, "an integer"),
    ("logprobs", -1, "None, 0 or larger"),
    ("prompt_logprobs", True, "None, 0 or larger"),
    ("ignore_eos", 1, "True or False"),
    ("skip_special_tokens", math.nan, "True or False"),
    ("include_stop_str_in_output", "no", "True or False"),
    ("stop", "", "non-empty strings"),
    ("stop", ["ok", ""], "non-empty strings"),
    ("stop", [3], "stop has 3"),
    ("stop", 3, "must be a list"),
    ("stop", b"END", "must be a list"),
    ("stop_token_ids", 3, "must be a list"),
    ("stop_token_ids", "3", "must be a list"),
    ("stop_token_ids", [-1], "stop_token_ids has -1"),
    ("stop_token_ids", [1.0], "stop_token_ids has 1.0"),
    ("logit_bias", [1, 2], "must map token ids"),
    ("logit_bias", {"5": 1.0}, "the key '5'"),
    ("logit_bias", {-5: 1.0}, "the key -5"),
    ("logit_bias", {5: "x"}, r"logit_bias\[5\] is 'x'"),
    ("logit_bias", {5: -math.inf}, r"logit_bias\[5\] is -inf: give a finite number"),
]


@pytest.mark.parametrize(("name", "value", "words"), REFUSED)
def test_refused_with_the_cure(name: str, value: Any, words: str) -> None:
    with pytest.raises(SamplingParamsError, match=words) as caught:
        SamplingParams(**{name: value})
    assert name in str(caught.value)
    assert isinstance(caught.value, RequestError)
    assert isinstance(caught.value, ValueError)


@given(value=st.one_of(st.floats(), st.integers(), st.text(max_size=3), st.none(), st.lists(st.integers(), max_size=2)))
@pytest.mark.parametrize("name", SamplingParams.__dataclass_fields__)
def test_any_value_is_taken_or_refused_and_nothing_else(name: str, value: Any) -> None:
    with suppress(SamplingParamsError):
        params = SamplingParams(**{name: value})
        assert replace(params) == params


def test_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(
        SamplingParamsError, match="unknown sampling parameter 'temprature': did you mean 'temperature'"
    ):
        SamplingParams(temprature=0.5)
    with pytest.raises(SamplingParamsError, match="'max_new_tokens': did you mean 'max_tokens'"):
        SamplingParams(max_new_tokens=5)
    with pytest.raises(SamplingParamsError, match=r"known: .*temperature.*top_p"):
        SamplingParams(zzzz=5)


def test_positional_values_are_refused() -> None:
    with pytest.raises(SamplingParamsError, match="takes keywords only"):
        SamplingParams(0.5)


def test_normalized_forms() -> None:
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(stop="END").stop_strings == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop_token_ids=[1, 2]).stop_token_ids == (1, 2)
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-6).greedy


def test_keeps_no_reference_to_what_it_was_given() -> None:
    bias, stop, ids = {1: 2.0}, ["a"], [3]
    params = SamplingParams(logit_bias=bias, stop=stop, stop_token_ids=ids)
    bias[9], stop[0], ids[0] = 9.0, "changed", 99
    assert (params.logit_bias, params.stop, params.stop_token_ids) == ({1: 2.0}, ("a",), (3,))


def test_min_tokens_may_not_pass_max_tokens() -> None:
    assert SamplingParams(max_tokens=5, min_tokens=5).min_tokens == 5
    with pytest.raises(SamplingParamsError, match=r"min_tokens is 6: .*between 0 and max_tokens"):
        SamplingParams(max_tokens=5, min_tokens=6)


def test_is_a_frozen_value() -> None:
    params = SamplingParams(temperature=0.5, stop="x", logit_bias={1: 1.0}, seed=3)
    with pytest.raises(FrozenInstanceError):
        params.seed = 4  # type: ignore[misc]
    assert copy.deepcopy(params) == params
    assert pickle.loads(pickle.dumps(params)) == params
    assert replace(params, n=4) == SamplingParams(temperature=0.5, stop="x", logit_bias={1: 1.0}, seed=3, n=4)
    with pytest.raises(SamplingParamsError, match="n is 0"):
        replace(params, n=0)
