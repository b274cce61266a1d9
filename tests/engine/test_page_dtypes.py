"""Engines on pages of every dtype: a plan with shared levels and one without give the same tokens."""

from __future__ import annotations

from pathlib import Path

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
