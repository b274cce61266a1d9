"""Segments spread over levels by weight, and sequences with a segment of their own, on the GPU path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from cascade_llm import SamplingParams
from cascade_llm.plan import CascadePlan
from cascade_llm.plan_file import PlanFileReader
from cascade_llm.scheduler.cascade.cost_model import plan_work
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of

NUM_SM = 4
"""Four tiles, with two KV heads: more than that in a level, and nothing is cut."""
COSTS = replace(
    DEVICE_COSTS["h200"], num_processors=NUM_SM, level_s=1e-12, segment_s=0.0, split_tokens=16, measured=True
)
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
OPTIONS = {"page_size": 4, "max_num_seqs": 16}


def text(family: int, length: int, own: int) -> list[int]:
    return [*(3 + (i * (family + 2)) % 80 for i in range(length)), *(4 + (own + i) % 80 for i in range(9))]


HEAVY_AMONG_LIGHT = [text(0, 160, i) for i in range(2)] + [
    text(1 + g, 24, 7 * g + i) for g in range(5) for i in range(2)
]
LONG_AMONG_SHORT = [text(i, 4, i) for i in range(9)] + [text(9, 200, 1)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **SHAPE)


@pytest.fixture(autouse=True)
def tiled_device() -> Iterator[None]:
    with patch.dict(DEVICE_COSTS, cpu=COSTS):
        yield


def decode_plans(path: Path) -> list[CascadePlan]:
    with PlanFileReader(path) as steps:
        return [step.plan.cascade for step in steps if step.plan.num_rows == step.plan.num_sequences]


@pytest.mark.parametrize(("prompts", "widest_level"), [(HEAVY_AMONG_LIGHT, 5), (LONG_AMONG_SHORT, 1)])
def test_graphs_run_them_as_the_torch_backend_does(
    tiny: Path, tmp_path: Path, prompts: list[list[int]], widest_level: int
) -> None:
    with tiny_llm(tiny, enable_cascade_attention=False, **OPTIONS) as twin:
        expected = [output["token_ids"] for output in twin.generate(prompts, GREEDY)]
    recorded = tmp_path / "plans.gz"
    with gpu_llm(tiny, double_gpu(num_sm=NUM_SM), record_plans=recorded, **OPTIONS) as llm:
        assert [output["token_ids"] for output in llm.generate(prompts, GREEDY)] == expected
        assert graphs_of(llm).counters.graph_steps >= 5
    work = [plan_work(plan).shared for plan in decode_plans(recorded)]
    assert any(len(levels[0]) == 1 and levels[0][0][0] >= 160 for levels in work if levels), "by itself on its level"
    assert max(len(levels[-1]) for levels in work if levels) == widest_level


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [2, 4])
def test_random_forests_give_the_tokens_of_plain_attention(tiny: Path, tmp_path: Path, seed: int, levels: int) -> None:
    """Chunked prefill, mixed steps and preemption, with every level balanced that can be."""
    prompts = random_forest(seed, 24, 80, 90) + LONG_AMONG_SHORT
    params = [SamplingParams(temperature=0, max_tokens=3 + i % 9, ignore_eos=True) for i in range(len(prompts))]
    options = {**OPTIONS, "max_num_batched_tokens": 64, "cascade_max_levels": levels}
    with tiny_llm(tiny, **{**options, "enable_cascade_attention": False}) as twin:
        expected = [output["token_ids"] for output in twin.generate(prompts, params)]
    recorded = tmp_path / "plans.gz"
    with tiny_llm(tiny, record_plans=recorded, **options) as llm:
        assert [output["token_ids"] for output in llm.generate(prompts, params)] == expected
    with PlanFileReader(recorded) as steps:
        segments = [segment for step in steps for level in plan_work(step.plan.cascade).shared for segment in level]
    assert len(segments) > 20
