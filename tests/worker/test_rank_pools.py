"""Ranks of a model whose windows have KV pools of their own: the same steps give the tokens of one rank."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_llm import SamplingParams
from cascade_llm.config import EngineOptions
from cascade_llm.device.ranks import Ranks
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.worker.worker import build_worker
from tests.engine.tiny_llm import save_tiny, tiny_llm
from tests.rank_threads import in_ranks
from tests.worker.rank_processes import PROMPTS

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)


@pytest.mark.parametrize("has_cascade", [True, False], ids=["cascade on", "cascade off"])
def test_ranks_replay_the_tokens_of_one(has_cascade: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "gemma3_text", sliding_window=12)
    options = {"dtype": "float32", "page_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    plans: list[StepPlan] = []
    expected: list[StepResult] = []
    with tiny_llm(folder, **options, enable_cascade_attention=has_cascade) as llm:
        llm.engine.on_step.append(
            lambda event: plans.append(event.plan) if event.result is None else expected.append(event.result)
        )
        llm.generate(PROMPTS, GREEDY)
        pages, has_levels = llm.facts.pool_pages, llm.stats()["cascade_steps"] > 0
    assert len(pages) == 2
    assert has_levels is has_cascade

    def replay(ranks: Ranks) -> list[StepResult]:
        checkpoint = open_checkpoint(folder)
        runner, _ = build_worker(EngineOptions(**options), checkpoint, ranks=ranks, pool_pages=pages)
        return [runner.submit(plan)() for plan in plans]

    found, others = in_ranks(2, tmp_path, replay)
    assert [result.token_ids for result in found] == [result.token_ids for result in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert mine is not None
            assert other is not None
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert all(len(result.token_ids) == 0 for result in others)
