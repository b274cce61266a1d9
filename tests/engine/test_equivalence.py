"""The engine against itself with everything switched the other way; against transformers: `test_families`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cascade_llm import LLM, SamplingParams
from tests.engine.tiny_llm import CONTEXT, assert_equal_outputs, random_forest, save_tiny, tiny_llm

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=2)
VOCAB = 97


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def close_after() -> Iterator[list[LLM]]:
    llms: list[LLM] = []
    yield llms
    for llm in llms:
        llm.close()


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 6))])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16, "max_num_seqs": 8},
        {"kv_pages": CONTEXT // 4 + 6},
        {"cascade_max_levels": 4, "page_size": 1},
        {"cascade_max_levels": 2, "page_size": 16, "cascade_shared_prefix_len": 16},
    ],
    ids=["plain", "chunked", "preempted", "four-levels", "two-levels"],
)
def test_cascade_on_and_off_give_the_same(
    tiny: Path, seed: int, options: dict[str, Any], close_after: list[LLM]
) -> None:
    options = dict(options)
    page_size = options.get("page_size", 4)
    if "kv_pages" in options:
        options["kv_cache_bytes"] = options.pop("kv_pages") * page_size * 2 * 3 * 2 * 8 * 4
    prompts = random_forest(seed, 12, VOCAB, 60)
    on = tiny_llm(tiny, **options)
    off = tiny_llm(tiny, **options, enable_cascade_attention=False)
    close_after.extend((on, off))
    assert_equal_outputs(on.generate(prompts, GREEDY), off.generate(prompts, GREEDY))
    assert on.stats()["cascade_steps"] > 0
    assert on.stats()["kv_bytes_saved"] > 0
    assert off.stats()["cascade_steps"] == off.stats()["kv_bytes_saved"] == 0
    if "kv_cache_bytes" in options:
        assert on.stats()["preemptions"] > 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kv_pages", [None, CONTEXT // 4 + 4])
def test_planning_a_step_ahead_changes_nothing(
    tiny: Path, seed: int, kv_pages: int | None, close_after: list[LLM]
) -> None:
    options = {} if kv_pages is None else {"kv_cache_bytes": kv_pages * 4 * 2 * 3 * 2 * 8 * 4}
    prompts = random_forest(seed, 10, VOCAB, 50)
    params = [
        SamplingParams(temperature=t, max_tokens=5 + i, seed=i, n=1 + i % 3, logprobs=2, repetition_penalty=1.1)
        for i, t in enumerate([0.0, 0.8] * 5)
    ]
    now = tiny_llm(tiny, schedule_lag=0, **options)
    ahead = tiny_llm(tiny, schedule_lag=1, **options)
    close_after.extend((now, ahead))
    first, second = now.generate(prompts, params), ahead.generate(prompts, params)
    for a, b in zip(first, second, strict=True):
        assert [o.token_ids for o in a.outputs] == [o.token_ids for o in b.outputs]
        assert [o.finish_reason for o in a.outputs] == [o.finish_reason for o in b.outputs]
    assert ahead.stats()["held_pages"] == 0


@pytest.fixture(scope="module")
def pooled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with a window, which have a pool of their own, and one that reads everything."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    folder = tmp_path_factory.mktemp("gemma")
    return save_tiny(folder, "gemma3_text", num_hidden_layers=3, layer_types=layers, sliding_window=12)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"max_num_batched_tokens": 16, "max_num_seqs": 8}, marks=pytest.mark.slow),
        pytest.param({"cascade_max_levels": 4, "page_size": 1}, marks=pytest.mark.slow),
        {"max_model_len": 96, "max_num_batched_tokens": 32, "kv_cache_bytes": (32 + 2 * 14) * 1024},
    ],
    ids=["plain", "chunked", "four-levels", "preempted"],
)
def test_pools_of_windows_change_nothing(
    pooled: Path, seed: int, options: dict[str, Any], close_after: list[LLM]
) -> None:
    """Planned a step ahead, with cascade, cold and warm, against no cascade and no step ahead."""
    prompts = random_forest(seed, 12, VOCAB, 60)
    plain = tiny_llm(pooled, enable_cascade_attention=False, schedule_lag=0)
    ahead = tiny_llm(pooled, schedule_lag=1, **options)
    close_after.extend((plain, ahead))
    expected = plain.generate(prompts, GREEDY)
    for _ in range(2):
        assert_equal_outputs(ahead.generate(prompts, GREEDY), expected)
    stats = ahead.stats()
    assert stats["cascade_steps"] > 0
    assert stats["window_12_total_pages"] < stats["total_pages"]
    assert stats["held_pages"] == stats["window_12_held_pages"] == 0
    if "kv_cache_bytes" in options:
        assert stats["preemptions"] > 0


def test_warm_cache_gives_the_same_as_cold(tiny: Path, close_after: list[LLM]) -> None:
    prompts = random_forest(3, 8, VOCAB, 60)
    llm = tiny_llm(tiny)
    close_after.append(llm)
    cold = llm.generate(prompts, GREEDY)
    computed = llm.stats()["prefilled_tokens"]
    warm = llm.generate(prompts, GREEDY)
    assert llm.stats()["prefilled_tokens"] - computed < computed / 3
    assert_equal_outputs(cold, warm)


def test_what_is_in_the_batch_does_not_change_a_draw(tiny: Path, close_after: list[LLM]) -> None:
    llm = tiny_llm(tiny)
    close_after.append(llm)
    params = SamplingParams(temperature=1.0, seed=7, max_tokens=16, ignore_eos=True)
    prompts = random_forest(5, 9, VOCAB, 40)
    alone = llm.generate(prompts[4], params)[0]["token_ids"]
    among = llm.generate(prompts, params)[4]["token_ids"]
    assert alone == among


def test_requests_that_arrive_together_compute_their_prefix_once(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, max_position_embeddings=2304, num_hidden_layers=1)
    shared = [3 + i % 90 for i in range(2048)]
    prompts = [[*shared, *(3 + (7 * i + j) % 90 for j in range(5 + i % 7))] for i in range(64)]
    for page_size, budget in ((16, 8192), (16, 512), (64, 8192)):
        options = {"page_size": page_size, "max_num_seqs": 64, "max_num_batched_tokens": budget, "debug": False}
        with tiny_llm(folder, **options) as llm:
            llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
            stats = llm.stats()
        own = sum(len(prompt) - 2048 for prompt in prompts)
        assert stats["prefilled_tokens"] == 2048 + own
        assert stats["cached_tokens"] == 63 * 2048
        assert stats["kv_bytes_saved"] > 0
