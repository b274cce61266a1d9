"""Engines on pages of every dtype: a plan with shared levels and one without give the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import LLM, SamplingParams
from cascade_llm.device import devices
from cascade_llm.plan_file import PlanFileReader
from cascade_llm.validation.replay import replay_attention
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.models.checkpoints import tiny_model

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


def test_a_number_that_float16_pages_cannot_hold_ends_that_request_alone(tmp_path: Path) -> None:
    """Token 11 alone has the dimension of its embedding from which the first layer makes a large V."""
    model = tiny_model("llama", max_position_embeddings=64)
    with torch.no_grad():
        embedding, v_proj = model.model.embed_tokens.weight, model.model.layers[0].self_attn.v_proj.weight
        embedding[:, 3], embedding[11, 3], v_proj[:, 3] = 0, 1, 1e6
    model.save_pretrained(tmp_path)
    prompts, params = [[5, 6, 7], [5, 6, 11], [5, 6, 8]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with tiny_llm(tmp_path, kv_cache_dtype="float32", debug=False, max_model_len=64) as llm:
        assert [out["finish_reason"] for out in llm.generate(prompts, params)] == ["length"] * 3
    with tiny_llm(tmp_path, kv_cache_dtype="float16", debug=False, max_model_len=64) as llm:
        outputs = llm.generate(prompts, params, on_error="return")
    assert [out["finish_reason"] for out in outputs] == ["length", "error", "length"]
    assert "kv_cache_dtype='float32'" in str(outputs[1].error)


def test_pages_that_were_chosen_are_told_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "_cpu_has_bfloat16", lambda: False)
    monkeypatch.setattr(devices, "_cpu_widens_float16", lambda: True)
    tiny_model("llama", max_position_embeddings=64).bfloat16().save_pretrained(tmp_path / "model")
    recording = tmp_path / "steps.plan"
    options = {"max_num_seqs": 4, "max_model_len": 64, "num_threads": 1, "record_plans": recording}
    with caplog.at_level("INFO"), LLM(tmp_path / "model", **options) as llm:
        assert (llm.facts.dtype, llm.facts.kv_dtype) == (torch.float32, torch.float16)
        llm.generate([[5, 6, 7], [5, 6, 8]], SamplingParams(max_tokens=3))
    assert "pages of K and V: torch.float16 (half the bytes" in caplog.text
    with PlanFileReader(recording) as reader:
        assert (reader.header.dtype, reader.header.kv_cache_dtype) == ("float32", "float16")
    _, checks = replay_attention(recording, device=torch.device("cpu"))
    assert [check.passed for check in checks if not check.name.startswith("flashinfer")] == [True] * 6
