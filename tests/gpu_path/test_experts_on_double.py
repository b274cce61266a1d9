"""Mixtures of experts on the GPU path: captured, on device memory alone, with the tokens of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import LLM, SamplingParams
from cascade_llm.weights.stack import Grouped, OneByOne
from cascade_llm.weights.stacked_linear import StackedLinear
from cascade_llm.worker import worker
from tests.doubles.flashinfer import FlashInferDouble
from tests.doubles.meta import ANY_TOKEN, MetaStream
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import double_gpu, gpu_llm, graphs_of

SHAPE = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
         "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 32}  # fmt: skip
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 4, "max_num_batched_tokens": 32}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("experts"), "qwen2_moe", **SHAPE, shared_expert_intermediate_size=40)


def stacks_of(llm: LLM) -> list[Any]:
    """Of all layers."""
    linears = llm._engine.executor.runner.decoder.linears
    return [linear.matrix for linear in linears if isinstance(linear, StackedLinear)]


def test_graphs_give_what_eager_steps_give_and_both_what_the_cpu_gives(folder: Path) -> None:
    prompts = random_forest(1, 4, 90, 24)
    with tiny_llm(folder) as llm:
        expected = llm.generate(prompts, GREEDY)
    found = []
    for enforce_eager in (False, True):
        with gpu_llm(folder, double_gpu(), enforce_eager=enforce_eager, **OPTIONS) as llm:
            assert all(isinstance(stack, Grouped) for stack in stacks_of(llm))
            found.append(llm.generate(prompts, GREEDY))
            assert enforce_eager or graphs_of(llm).counters.graph_steps > 0
    assert [output.outputs[0].token_ids for output in found[0]] == [output.outputs[0].token_ids for output in found[1]]
    for mine, other in zip(found[0], expected, strict=True):
        first, twin = ([logprob for _, logprob in output.outputs[0].logprobs[0].top] for output in (mine, other))
        assert first == pytest.approx(twin, abs=0.1), "bfloat16"


def test_no_step_reads_the_device_on_the_host(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "resolve_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(worker, "step_bytes", lambda *arguments, **options: 0)
    monkeypatch.setattr(worker, "compute_capability", lambda device: None)
    with gpu_llm(folder, FlashInferDouble(MetaStream(), num_sm=16, exact=True), **OPTIONS) as llm:
        (output, *_) = llm.generate(random_forest(1, 4, 90, 24), GREEDY)
        assert set(output.outputs[0].token_ids) == {ANY_TOKEN}
        assert graphs_of(llm).counters.graph_steps > 0


def test_without_a_grouped_kernel_there_are_no_graphs_and_the_start_says_why(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = random_forest(1, 4, 90, 24)
    with tiny_llm(folder) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)]
    with gpu_llm(folder, double_gpu(), **{**OPTIONS, "dtype": "float32"}) as llm:
        assert all(isinstance(stack, OneByOne) for stack in stacks_of(llm))
        assert llm._engine.executor.runner.graphs is None
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY)] == expected
    assert "without CUDA graphs: experts are multiplied one by one" in caplog.text
