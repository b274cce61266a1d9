"""Engines on pages of every dtype: a plan with shared levels and one without give the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cascade_llm import SamplingParams
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm

BYTES_PER_VECTOR = {"float32": 32, "bfloat16": 16, "float16": 16, "fp8_e4m3": 8, "int8": 8 + 4}
"""Of head_dim 8."""


@pytest.mark.parametrize("dtype", BYTES_PER_VECTOR)
def test_cascade_changes_no_token_and_pages_are_as_small_as_told(dtype: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    found = []
    for is_on in (True, False):
        with tiny_llm(folder, kv_cache_dtype=dtype, enable_cascade_attention=is_on) as llm:
            found.append([output["token_ids"] for output in llm.generate(random_forest(3, 8, 90, 50), params)])
            assert (llm.stats()["cascade_steps"] > 0) == is_on
            model = llm.facts.model
            vectors = 2 * model.num_layers * model.num_kv_heads
            assert model.head_dim == 8
            assert llm.facts.kv_bytes_per_token == vectors * BYTES_PER_VECTOR[dtype]
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "float16"])
def test_preempted_forked_and_cached_sequences_find_their_pages_as_they_were(dtype: str, tmp_path: Path) -> None:
    """Three samples of each prompt, whose last page is copied; a pool that some must leave; then all from the cache."""
    folder, prompts = save_tiny(tmp_path), random_forest(5, 6, 90, 40)
    params = SamplingParams(temperature=1, seed=3, n=3, max_tokens=12, ignore_eos=True)

    def tokens(**options: Any) -> tuple[list[list[list[int]]], dict[str, Any]]:
        with tiny_llm(folder, kv_cache_dtype=dtype, max_model_len=64, **options) as llm:
            rounds = [[[one.token_ids for one in out.outputs] for out in llm.generate(prompts, params)] for _ in (1, 2)]
            assert rounds[0] == rounds[1]
            return rounds[0], dict(llm.stats())

    with tiny_llm(folder, kv_cache_dtype=dtype, max_model_len=64) as llm:
        bytes_per_token = llm.facts.kv_bytes_per_token
    roomy, _ = tokens(kv_cache_bytes=4000 * bytes_per_token)
    tight, stats = tokens(kv_cache_bytes=120 * bytes_per_token)
    assert stats["preemptions"] > 0
    assert stats["cached_tokens"] > 0
    assert tight == roomy
