"""The whole engine on the GPU path, against the torch backend: tokens, log-probabilities, and how steps were run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cascade_llm import SamplingParams
from tests.engine.tiny_llm import assert_equal_outputs, random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
VOCAB = 90


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **SHAPE)


def tokens(outputs: Any) -> list[list[list[int]]]:
    return [[list(sample.token_ids) for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
def test_equals_the_torch_backend(tiny: Path, lag: int, enforce_eager: bool) -> None:
    prompts = random_forest(3, 10, VOCAB, 60)
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(prompts, GREEDY))
        assert twin.stats()["cascade_steps"] > 0
    double = double_gpu()
    with gpu_llm(tiny, double, schedule_lag=lag, enforce_eager=enforce_eager) as llm:
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        assert llm.stats()["cascade_steps"] > 0
        if not enforce_eager:
            counters = graphs_of(llm).counters
            assert counters.graph_steps >= 8
            assert set(counters.eager_steps) <= {"a sequence has several rows"}
            assert counters.eagerly_sampled_steps == 0
            assert double.stream.num_replays == 2 * counters.graph_steps
