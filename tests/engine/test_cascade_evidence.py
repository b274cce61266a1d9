"""That sharing happened is in the counters: a load that shares and reports nothing fails here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cascade_llm import LLM, SamplingParams
from tests.engine.tiny_llm import save_tiny, tiny_llm

NUM_SHARERS, PREFIX_LEN, MAX_TOKENS = 16, 1024, 6
GREEDY = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer with the attention of a real small model, so that the cost model judges a real case."""
    return save_tiny(
        tmp_path_factory.mktemp("wide"),
        num_hidden_layers=1,
        hidden_size=72,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=2048,
    )


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def run(folder: Path, prompts: list[list[int]], params: SamplingParams = GREEDY, **options: Any) -> LLM:
    with LLM(folder, dtype="float32", max_num_seqs=NUM_SHARERS, **options) as llm:
        llm.generate(prompts, params)
        return llm


def sharing_prompts() -> list[list[int]]:
    prefix = [3 + i % 90 for i in range(PREFIX_LEN)]
    return [[*prefix, 10 + i, 20 + i] for i in range(NUM_SHARERS)]


def test_a_sharing_load_saves_what_it_shares_by_default(folder: Path) -> None:
    llm = run(folder, sharing_prompts())
    stats = llm.stats()
    assert stats["cascade_steps"] >= MAX_TOKENS - 1
    assert stats["grouped_rows"] >= NUM_SHARERS * (MAX_TOKENS - 1)
    assert stats["shared_groups"] >= MAX_TOKENS - 1
    saved_tokens = (NUM_SHARERS - 1) * PREFIX_LEN * (MAX_TOKENS - 1)
    assert stats["kv_bytes_saved"] >= saved_tokens * llm.facts.kv_bytes_per_token
    last = llm.plan_report()["last_step"]
    assert last["num_levels"] == 2
    assert last["reason"] is None
    assert last["kv_tokens_saved"] == (NUM_SHARERS - 1) * PREFIX_LEN


def test_samples_of_one_prompt_share(folder: Path) -> None:
    llm = run(folder, sharing_prompts()[:1], SamplingParams(n=NUM_SHARERS, max_tokens=MAX_TOKENS, ignore_eos=True))
    assert llm.stats()["cascade_steps"] >= MAX_TOKENS - 1
    assert llm.stats()["kv_bytes_saved"] > 0


@pytest.mark.parametrize(
    ("options", "prompts", "reason"),
    [
        ({"enable_cascade_attention": False}, [[*range(3, 40), i] for i in range(4)], "cascade attention is off"),
        ({}, [[*range(3, 40)]], "one sequence"),
        ({}, [[i] * 12 for i in range(3, 7)], "no two sequences share a full page"),
        ({"cascade_shared_prefix_len": None}, [[*range(3, 12), i] for i in range(2)], "the cost model expects no gain"),
        (
            {"cascade_shared_prefix_len": 40},
            [[*range(3, 30), i] for i in range(4)],
            r"no shared run of 40 tokens (cascade_shared_prefix_len)",
        ),
    ],
)
def test_what_is_not_shared_has_a_reason(
    small_folder: Path, options: dict[str, Any], prompts: list[list[int]], reason: str
) -> None:
    with tiny_llm(small_folder, **options) as llm:
        assert llm.plan_report() == {"last_step": None, "unshared_steps": {}}
        llm.generate(prompts, GREEDY)
        report, stats = llm.plan_report(), llm.stats()
    assert next(iter(report["unshared_steps"])) == reason
    assert sum(report["unshared_steps"].values()) == stats["steps"]
    assert report["last_step"]["reason"] == reason
    assert stats["cascade_steps"] == stats["kv_bytes_saved"] == stats["grouped_rows"] == 0
