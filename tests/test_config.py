"""Configuration: names, ranges, contradictions, and that every refusal says the cure."""

from __future__ import annotations

import math
import pickle
from contextlib import suppress
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.config import MAX_CASCADE_LEVELS, CascadeConfig, EngineOptions, ModelConfig, SchedulerConfig
from cascade_llm.errors import ConfigError

# EngineOptions

REFUSED: list[tuple[str, Any, str]] = [
    ("dtype", "int8", "auto, float32, bfloat16, float16"),
    ("dtype", 16, "auto, float32"),
    ("attention_backend", "flash", "auto, flashinfer, native, torch"),
    ("kv_cache_dtype", "fp8", "auto, float32"),
    ("quantization", "awq", "must be one of None, q4_k, q8_0, int8, int4, fp8"),
    ("device", "gpu", "'auto', 'cpu', 'cuda' or 'cuda:N'"),
    ("device", "cuda:", "'cuda:N'"),
    ("device", "cuda:one", "'cuda:N'"),
    ("device", 0, "'cuda:N'"),
    ("num_threads", 0, "1 or larger"),
    ("num_threads", 1.5, "an integer"),
    ("page_size", 0, "1 or larger"),
    ("num_threads", 10**9, "1000000000: it must be an integer, 1 to 1,024"),
    ("max_num_seqs", 10**10, "1 to 2,147,483,647"),
    ("kv_cache_bytes", 2**63, "1 to"),
    ("page_size", True, "an integer"),
    ("page_size", None, "an integer"),
    ("max_model_len", 0, "1 or larger"),
    ("max_model_len", "8k", "an integer"),
    ("max_num_seqs", -1, "1 or larger"),
    ("max_num_batched_tokens", 0, "1 or larger"),
    ("kv_cache_bytes", 0, "1 or larger"),
    ("kv_cache_bytes", "4GB", "an integer"),
    ("gpu_memory_utilization", 0, r"in \(0, 1\]"),
    ("gpu_memory_utilization", 1.1, r"in \(0, 1\]"),
    ("gpu_memory_utilization", 90, r"in \(0, 1\]"),
    ("gpu_memory_utilization", math.nan, r"in \(0, 1\]"),
    ("gpu_memory_utilization", "0.9", r"in \(0, 1\]"),
    ("enable_prefix_caching", 1, "True or False"),
    ("enable_cascade_attention", "yes", "True or False"),
    ("enforce_eager", None, "True or False"),
    ("debug", 0, "True or False"),
    ("cascade_shared_prefix_len", 0, "or None to leave the choice to the cost model"),
    ("cascade_shared_prefix_len", "long", "give 1 or more tokens"),
    ("cascade_shared_prefix_len", True, "give 1 or more tokens"),
    ("cascade_max_levels", 0, r"1 \(plain attention\) to 4"),
    ("cascade_max_levels", MAX_CASCADE_LEVELS + 1, "to 4"),
    ("cascade_max_levels", 2.0, "to 4"),
    ("tensor_parallel_size", 9, "1 to 8"),
    ("rank_timeout_s", 0, "a number of seconds above 0"),
    ("schedule_lag", 2, "0, 1 or None"),
    ("schedule_lag", -1, "0, 1 or None"),
    ("schedule_lag", True, "0, 1 or None"),
    ("seed", 0.5, "an integer"),
    ("seed", 2**63, "an integer in"),
    ("seed", None, "an integer"),
]


@pytest.mark.parametrize(("name", "value", "words"), REFUSED)
def test_option_is_refused_with_the_cure(name: str, value: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        EngineOptions(**{name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}: ")


ALLOWED: list[tuple[str, Any]] = [
    ("dtype", "bfloat16"),
    ("device", "cuda:3"),
    ("num_threads", 2),
    ("page_size", 1),
    ("max_model_len", 4096),
    ("kv_cache_bytes", 2**40),
    ("gpu_memory_utilization", 1),
    ("cascade_shared_prefix_len", 1),
    ("cascade_max_levels", 1),
    ("cascade_max_levels", MAX_CASCADE_LEVELS),
    ("schedule_lag", 0),
    ("schedule_lag", 1),
    ("seed", -(2**63)),
    ("debug", True),
]


@pytest.mark.parametrize(("name", "value"), ALLOWED)
def test_option_is_taken_as_given(name: str, value: Any) -> None:
    options = EngineOptions(**{name: value})
    assert getattr(options, name) == value
    assert options.given() == {name: value}


@given(value=st.one_of(st.floats(), st.integers(), st.text(max_size=3), st.none(), st.lists(st.integers(), max_size=1)))
@pytest.mark.parametrize("name", EngineOptions.__dataclass_fields__)
def test_any_value_is_taken_or_refused_and_nothing_else(name: str, value: Any) -> None:
    with suppress(ConfigError):
        assert getattr(EngineOptions(**{name: value}), name) == value


def test_unknown_option_gets_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="unknown option 'max_seqs': did you mean 'max_num_seqs'"):
        EngineOptions(max_seqs=3)
    with pytest.raises(ConfigError, match=r"known: .*dtype.*seed"):
        EngineOptions(qqqq=3)


def test_defaults_give_nothing() -> None:
    options = EngineOptions()
    assert options.given() == {}
    assert options.enable_cascade_attention
    assert options.cascade_shared_prefix_len is None


def test_options_are_a_frozen_value() -> None:
    options = EngineOptions(seed=4)
    with pytest.raises(FrozenInstanceError):
        options.seed = 5  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(options)) == options
    assert replace(options, page_size=8).given() == {"seed": 4, "page_size": 8}


def test_cascade_part_is_what_was_asked() -> None:
    options = EngineOptions(enable_cascade_attention=False, cascade_shared_prefix_len=64, cascade_max_levels=2)
    assert options.cascade == CascadeConfig(enabled=False, shared_prefix_len=64, max_levels=2)


# CascadeConfig


@pytest.mark.parametrize(
    ("enabled", "max_levels", "shared"), [(True, 1, 0), (True, 2, 1), (True, 4, 3), (False, 4, 0), (False, 1, 0)]
)
def test_levels_above_the_leaf(enabled: bool, max_levels: int, shared: int) -> None:
    assert CascadeConfig(enabled=enabled, max_levels=max_levels).max_shared_levels == shared


# SchedulerConfig

POOL = SchedulerConfig(page_size=16, total_pages=64, max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=64)


@pytest.mark.parametrize(
    "name", ["page_size", "total_pages", "max_model_len", "max_num_seqs", "max_num_batched_tokens"]
)
def test_scheduler_sizes_are_positive(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0: it must be 1 or larger"):
        replace(POOL, **{name: 0})


def test_budget_holds_a_token_of_every_sequence() -> None:
    assert replace(POOL, max_num_batched_tokens=8).max_num_batched_tokens == 8
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(7\) is below max_num_seqs \(8\).*raise the first"):
        replace(POOL, max_num_batched_tokens=7)


def test_pool_holds_one_sequence_of_full_length() -> None:
    with pytest.raises(ConfigError) as caught:
        replace(POOL, total_pages=63)
    message = str(caught.value)
    assert "63 pages of 16 tokens" in message
    assert "1024 needs 64" in message
    assert "kv_cache_bytes" in message
    assert "set max_model_len to 1008 or less" in message


@given(page_size=st.integers(1, 64), total_pages=st.integers(1, 64), max_model_len=st.integers(1, 5000))
def test_the_cure_for_a_small_pool_works(page_size: int, total_pages: int, max_model_len: int) -> None:
    sizes = {"page_size": page_size, "total_pages": total_pages}
    if page_size * total_pages >= max_model_len:
        assert replace(POOL, **sizes, max_model_len=max_model_len).total_pages == total_pages
    else:
        with pytest.raises(ConfigError, match=f"set max_model_len to {page_size * total_pages} or less"):
            replace(POOL, **sizes, max_model_len=max_model_len)
        assert replace(POOL, **sizes, max_model_len=page_size * total_pages).total_pages == total_pages


# ModelConfig


def test_model_figures() -> None:
    """SmolLM2-135M: 30 layers, 9 query and 3 KV heads of 64."""
    model = ModelConfig(
        architecture="llama",
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_qo_heads=9,
        num_kv_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
    )
    assert model.sm_scale == pytest.approx(0.125)
    assert model.kv_bytes_per_token(2) == 2 * 30 * 3 * 64 * 2
    assert model.kv_bytes_per_token(4) == 2 * model.kv_bytes_per_token(2)
