"""Options that are made from records: each field, each kind of value."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from cascade_llm.cli.field_options import (
    SectionedCommand,
    engine_options,
    field_docs,
    sampling_options,
    take_engine,
    take_sampling,
)
from cascade_llm.config import EngineOptions
from cascade_llm.errors import CascadeError, ConfigError, SamplingParamsError
from cascade_llm.sampling_params import SamplingParams

SAMPLING_CASES: dict[str, tuple[list[str], Any]] = {
    "temperature": (["--temperature", "0.5"], 0.5),
    "top_k": (["--top-k", "-1"], -1),
    "top_p": (["--top-p", "0.9"], 0.9),
    "min_p": (["--min-p", "0.1"], 0.1),
    "presence_penalty": (["--presence-penalty", "-1.5"], -1.5),
    "frequency_penalty": (["--frequency-penalty", "1"], 1.0),
    "repetition_penalty": (["--repetition-penalty", "1.2"], 1.2),
    "logit_bias": (["--logit-bias", "3=-100", "--logit-bias", "4=2.5"], {3: -100.0, 4: 2.5}),
    "seed": (["--seed", "-7"], -7),
    "n": (["--n", "3"], 3),
    "max_tokens": (["--max-tokens", "9"], 9),
    "min_tokens": (["--min-tokens", "2"], 2),
    "stop": (["--stop", "a b", "--stop", "c"], ["a b", "c"]),
    "stop_token_ids": (["--stop-token-ids", "5", "--stop-token-ids", "6"], [5, 6]),
    "ignore_eos": (["--ignore-eos"], True),
    "logprobs": (["--logprobs", "0"], 0),
    "prompt_logprobs": (["--prompt-logprobs", "2"], 2),
    "prompt_logprobs_start": (["--prompt-logprobs", "2", "--prompt-logprobs-start", "3"], 3),
    "skip_special_tokens": (["--no-skip-special-tokens"], False),
    "include_stop_str_in_output": (["--include-stop-str-in-output"], True),
    "split_special_tokens": (["--split-special-tokens"], True),
}

ALSO_NEEDED = {"prompt_logprobs_start": {"prompt_logprobs": 2}}
"""What a field does nothing without."""

ENGINE_CASES: dict[str, tuple[list[str], Any]] = {
    "dtype": (["--dtype", "float32"], "float32"),
    "num_threads": (["--num-threads", "2"], 2),
    "gpu_memory_utilization": (["--gpu-memory-utilization", "0.5"], 0.5),
    "enable_prefix_caching": (["--disable-prefix-caching"], False),
    "enable_cascade_attention": (["--enable-cascade-attention"], True),
    "cascade_shared_prefix_len": (["--cascade-shared-prefix-len", "64"], 64),
    "enforce_eager": (["--enforce-eager"], True),
    "seed": (["--engine-seed", "11"], 11),
}


def parse(args: list[str]) -> tuple[SamplingParams, dict[str, Any]]:
    """Both records of a command line; raises what taking them raises."""
    taken: list[Any] = []

    @click.command(cls=SectionedCommand)
    @sampling_options
    @engine_options()
    def command(**arguments: Any) -> None:
        taken.extend((take_sampling(arguments), take_engine(arguments)))
        assert not arguments, "all are taken"

    result: Result = CliRunner().invoke(command, args)
    if isinstance(result.exception, CascadeError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return taken[0], taken[1]


def test_every_sampling_field_has_a_case() -> None:
    assert SAMPLING_CASES.keys() == {field.name for field in fields(SamplingParams)}


@pytest.mark.parametrize("name", SAMPLING_CASES)
def test_a_sampling_option_is_its_field(name: str) -> None:
    args, value = SAMPLING_CASES[name]
    assert parse(args)[0] == SamplingParams(**{name: value, **ALSO_NEEDED.get(name, {})})


def test_all_sampling_options_together() -> None:
    args = [arg for case in SAMPLING_CASES.values() for arg in case[0]]
    assert parse(args)[0] == SamplingParams(**{name: value for name, (_, value) in SAMPLING_CASES.items()})


@pytest.mark.parametrize("name", ENGINE_CASES)
def test_an_engine_option_is_its_field(name: str) -> None:
    args, value = ENGINE_CASES[name]
    assert parse(args)[1] == {name: value}


def test_nothing_given_is_nothing_handed_on() -> None:
    assert parse([]) == (SamplingParams(), {})


def test_both_seeds() -> None:
    params, engine = parse(["--seed", "1", "--engine-seed", "2"])
    assert (params.seed, engine) == (1, {"seed": 2})


@pytest.mark.parametrize(
    ("args", "kind", "words"),
    [
        (["--temperature", "-1"], SamplingParamsError, "temperature is -1.0: it must be 0 or larger"),
        (["--logit-bias", "a=1"], SamplingParamsError, "write TOKEN_ID=BIAS"),
        (["--logit-bias", "17"], SamplingParamsError, "write TOKEN_ID=BIAS"),
        (["--page-size", "0"], ConfigError, "page_size is 0"),
        (["--dtype", "float64"], ConfigError, "must be one of auto"),
    ],
)
def test_values_out_of_range_are_the_records_own_errors(args: list[str], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words.replace("(", r"\(")):
        parse(args)


def test_defaults_of_a_command_give_way_to_what_is_given() -> None:
    assert take_sampling({"sampling_temperature": None, "sampling_stop": ()}, temperature=0.0).temperature == 0.0
    assert take_sampling({"sampling_temperature": 0.7}, temperature=0.0).temperature == 0.7


def test_docs_are_read_from_below_the_fields() -> None:
    assert field_docs(Documented) == {"first": "The first, on two lines.", "third": "The third."}


def test_every_field_of_both_records_is_documented() -> None:
    for record in (SamplingParams, EngineOptions):
        assert field_docs(record).keys() == {field.name for field in fields(record)}


@dataclass
class Documented:
    """A class of its own."""

    first: int = 0
    """The first,
    on two lines."""
    second: int = 0
    third: int = 0
    """The third."""
