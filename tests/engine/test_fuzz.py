"""A one-layer real model through `Engine.step` while requests come, fork, are aborted and preempted in a tiny pool."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cascade_llm import LLM, SamplingParams
from cascade_llm.engine.requests import RequestState
from tests.engine.tiny_llm import assert_equal_outputs, random_forest, save_tiny, tiny_llm

CONTEXT = 64
VOCAB = 97
MAX_IDLE_STEPS = 3
PREEMPTING = (1, 2, 6, 7, 10)
"""Of the first twelve, those that preempt most, at both lags."""


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("llama"), num_hidden_layers=1, max_position_embeddings=CONTEXT)


def random_params(rng: random.Random) -> SamplingParams:
    """Greedy, so that near-ties can be told from errors; of any length and number of samples."""
    return SamplingParams(temperature=0, max_tokens=rng.randint(1, 14), n=rng.choice([1, 1, 1, 2, 5]), logprobs=2)


def drive(llm: LLM, rng: random.Random, num_requests: int) -> list[RequestState]:
    """Run requests to their ends with random arrivals and aborts, checking the pool after every step."""
    engine, scheduler = llm._engine, llm._engine.scheduler
    prompts = random_forest(rng.randrange(1000), num_requests, VOCAB, CONTEXT - 16)
    states: list[RequestState] = []
    idle = 0
    while len(states) < num_requests or engine.has_unfinished:
        if len(states) < num_requests and rng.random() < 0.5:
            params = random_params(rng)
            read = llm._input.read_prompt(prompts[len(states)], params)
            states.append(engine.add(llm._input.request(read, params, rng.choice([0, 0, 1]))))
        if states and rng.random() < 0.02:
            engine.abort(rng.choice(states).request.request_id)
        before = scheduler.counters.steps
        engine.step()
        scheduler.check()
        waits = engine.has_unfinished and scheduler.counters.steps == before and not scheduler.num_in_flight
        idle = idle + 1 if waits else 0
        assert idle < MAX_IDLE_STEPS, "nothing moves"
    counts = scheduler.page_counts
    assert counts.held_pages == 0
    assert counts.free_pages + counts.cached_pages == counts.total_pages
    return states


def check_against_alone(folder: Path, states: list[RequestState]) -> None:
    """Each request that ran to its end gives what it gives alone, without cascade, cache or company."""
    ended = [state for state in states if all(o.finish_reason in ("stop", "length") for o in state.output.outputs)]
    assert ended
    with tiny_llm(folder, enable_cascade_attention=False, enable_prefix_caching=False, debug=False) as alone:
        for state in ended:
            expected = alone.generate(list(state.request.prompt_token_ids), state.request.params)
            assert_equal_outputs([state.output], expected)


def run(folder: Path, seed: int, num_requests: int) -> dict[str, int]:
    rng = random.Random(seed)
    page_size = rng.choice([1, 2, 4, 8])
    pages = -(-CONTEXT // page_size) + rng.choice([0, 2, 8])
    options: dict[str, Any] = {
        "page_size": page_size,
        "kv_cache_bytes": pages * page_size * 2 * 2 * 8 * 4,
        "max_num_seqs": rng.choice([2, 4, 9]),
        "max_num_batched_tokens": rng.choice([9, 20, 64]),
        "cascade_max_levels": rng.choice([2, 3, 4]),
        "cascade_shared_prefix_len": rng.choice([1, 4]),
        "enable_prefix_caching": rng.random() < 0.8,
        "schedule_lag": seed % 2,
    }
    with tiny_llm(folder, **options) as llm:
        states = drive(llm, rng, num_requests)
        check_against_alone(folder, states)
        return llm.stats()


@pytest.mark.parametrize("seeds", [PREEMPTING, pytest.param(range(12), marks=pytest.mark.slow)], ids=str)
def test_random_traffic_in_tiny_pools(one_layer: Path, seeds: Sequence[int]) -> None:
    totals: dict[str, int] = {}
    for seed in seeds:
        for name, count in run(one_layer, seed, num_requests=14).items():
            totals[name] = totals.get(name, 0) + count
    assert totals["preemptions"] > 10
    assert totals["cascade_steps"] > 100
    assert totals["cached_tokens"] > 0
    assert totals["recomputed_tokens"] > 0


@pytest.mark.slow
def test_ten_thousand_steps_of_random_traffic(one_layer: Path) -> None:
    steps, seed = 0, 1000
    while steps < 10_000:
        steps += run(one_layer, seed, num_requests=60)["steps"]
        seed += 1
