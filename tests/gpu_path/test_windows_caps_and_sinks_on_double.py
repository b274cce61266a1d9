"""Gemma's windows and soft caps, and gpt-oss's sinks, in captured graphs on the double, with the tokens of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_llm import SamplingParams
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=2)
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 32}


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_gemma_s_tokens_are_those_of_the_cpu(architecture: str, tmp_path: Path) -> None:
    layer_types = ["sliding_attention", "full_attention"]
    folder = save_tiny(tmp_path, architecture, **SHAPE, layer_types=layer_types, sliding_window=12)
    prompts = random_forest(1, 4, 90, 40)
    with tiny_llm(folder, **LIMITS) as llm:
        expected = [output["token_ids"] for output in llm.generate(prompts, GREEDY)]
    with gpu_llm(folder, double_gpu(), **LIMITS) as llm:
        assert [output["token_ids"] for output in llm.generate(prompts, GREEDY)] == expected
        counters = graphs_of(llm).counters
        assert counters.graph_steps > 0
        assert counters.piecewise_steps > 0


def test_gpt_oss_gives_in_graphs_what_it_gives_without_and_on_the_cpu(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "gpt_oss", **SHAPE, sliding_window=12)
    prompts = random_forest(1, 4, 90, 24)
    with tiny_llm(folder, **LIMITS) as llm:
        expected = llm.generate(prompts, GREEDY)
    found = []
    for enforce_eager in (False, True):
        with gpu_llm(folder, double_gpu(), dtype="bfloat16", enforce_eager=enforce_eager, **LIMITS) as llm:
            found.append(llm.generate(prompts, GREEDY))
            assert enforce_eager or graphs_of(llm).counters.graph_steps > 0
    assert [output["token_ids"] for output in found[0]] == [output["token_ids"] for output in found[1]]
    for mine, other in zip(found[0], expected, strict=True):
        first, twin = ([logprob for _, logprob in output.outputs[0].logprobs[0].top] for output in (mine, other))
        assert first == pytest.approx(twin, abs=0.2), "bfloat16"
