"""A recording of an engine with several KV pools, replayed in graphs on the double and by the torch backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cascade_llm import SamplingParams
from cascade_llm.plan_file import PlanFileReader
from cascade_llm.validation import engine_replay, replay_file
from cascade_llm.worker.worker import build_worker
from tests.engine.tiny_llm import random_forest, save_tiny
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm

pytestmark = pytest.mark.slow


def test_a_recording_of_graphs_with_pools_is_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, path = ["sliding_attention", "full_attention"], tmp_path / "plans"
    folder = save_tiny(tmp_path / "tiny", "gemma3_text", **SHAPE, layer_types=layers, sliding_window=12)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, n=2)
    limits = {"max_model_len": 64, "max_num_seqs": 8}
    with gpu_llm(folder, double_gpu(), record_plans=path, record_token_ids=True, **limits) as llm:
        llm.generate(random_forest(0, 8, 90, 40), params)
        assert llm.stats()["cascade_steps"] > 0
        pool_pages = llm.facts.pool_pages
    assert pool_pages[1] < pool_pages[0]
    built = []

    def build(*arguments: Any, **options: Any) -> Any:
        built.append(build_worker(*arguments, **options, platform=double_gpu().platform()))
        return built[-1]

    monkeypatch.setattr(engine_replay, "build_worker", build)
    (check,) = engine_replay.replay_engine(path, folder, {})
    assert check.passed
    assert check.figures["greedy_differing"] == 0
    assert check.figures["tokens"] > 100
    runner, facts = built[0]
    assert runner.graphs.counters.graph_steps > 0
    with PlanFileReader(path) as reader:
        assert [*facts.pool_pages] == reader.header.pool_pages == [*pool_pages]
    assert replay_file.replay(path, options={"attention_backend": "torch"}).passed
