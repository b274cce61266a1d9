"""Ways to rotate, to scale and to place norms, in captured graphs on the double: the tokens of the CPU's engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cascade_llm import SamplingParams
from tests.engine.tiny_llm import assert_equal_outputs, random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of
from tests.models.checkpoints import TINY

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
MODELS: dict[str, dict[str, Any]] = {"glm4": {}, "smollm3": {"no_rope_layers": [0, 1]}, "olmo2": {}, "granite": {}}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", MODELS)
def test_tokens_are_those_of_the_cpu(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, architecture, **SHAPE, **MODELS[architecture])
    prompts = random_forest(5, 8, TINY["vocab_size"], 40)
    with tiny_llm(folder) as twin:
        expected = twin.generate(prompts, GREEDY)
    with gpu_llm(folder, double_gpu(), max_num_batched_tokens=64) as llm:
        assert_equal_outputs(llm.generate(prompts, GREEDY), expected)
        counters = graphs_of(llm).counters
        assert counters.piecewise_steps > 0
        assert counters.graph_steps > 0
