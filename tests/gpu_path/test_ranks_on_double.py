"""Graphs of ranks that share a model: the same steps give the tokens of one rank, each on a GPU made of doubles."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_llm import SamplingParams
from cascade_llm.config import EngineOptions
from cascade_llm.device.ranks import Ranks
from cascade_llm.engine.engine import StepEvent
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.worker.worker import build_worker
from tests.engine.tiny_llm import save_tiny
from tests.gpu_path.gloo_ranks import join_by_gloo
from tests.gpu_path.gpu_engine import OPTIONS, SHAPE, double_gpu, gpu_llm
from tests.rank_threads import in_ranks

SHARED = [3 + i % 80 for i in range(64)]
PROMPTS = [[*SHARED, *range(5, 9 + i)] for i in range(4)] + [[60 - i for i in range(9)]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=3, n=2, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, presence_penalty=0.5, logprobs=2),
    SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=1),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=21),
]


@pytest.mark.slow
def test_two_ranks_replay_the_tokens_of_one(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", **SHAPE)
    plans: list[StepPlan] = []
    expected: dict[int, StepResult] = {}

    def record(event: StepEvent) -> None:
        if event.result is None:
            plans.append(event.plan)
        else:
            expected[event.result.step_id] = event.result

    with gpu_llm(folder, double_gpu(), **OPTIONS) as llm:
        llm.engine.on_step.append(record)
        llm.generate(PROMPTS, PARAMS)
    options = EngineOptions(dtype="float32", max_num_batched_tokens=64, **OPTIONS)

    def replay(ranks: Ranks) -> tuple[list[StepResult], dict[str, int]]:
        platform = double_gpu().platform()
        runner, _ = build_worker(options, open_checkpoint(folder), ranks=ranks, platform=platform)
        assert runner.graphs is not None
        return [runner.submit(plan)() for plan in plans], runner.graphs.counters.as_dict()

    (found, counts), (others, other_counts) = in_ranks(2, tmp_path, replay, join_by_gloo)
    assert [result.token_ids for result in found] == [expected[result.step_id].token_ids for result in found]
    assert all(len(result.token_ids) == 0 for result in others)
    assert counts["graph_steps"] == other_counts["graph_steps"] > 0
    assert counts["piecewise_steps"] == other_counts["piecewise_steps"] > 0
    assert counts["eagerly_sampled_steps"] == other_counts["eagerly_sampled_steps"] > 0
