"""Quantized checkpoints through the whole engine on the GPU path: in their bits, captured, on device memory alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import LLM, SamplingParams
from cascade_llm.errors import ConfigError
from cascade_llm.worker import worker
from tests.doubles.flashinfer import FlashInferDouble
from tests.doubles.meta import ANY_TOKEN, MetaStream
from tests.doubles.torch_products import cuda_products
from tests.engine.test_quantized_checkpoints import save_twins
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import double_gpu, gpu_llm, graphs_of
from tests.loader.quantized_files import Written, awq, gptq

SHAPE = {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
         "hidden_size": 128, "intermediate_size": 128, "max_position_embeddings": 256}  # fmt: skip
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 4, "max_num_batched_tokens": 32}
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2)
BLOCK_LEN = 128


def fp8_blocks(seed: int, out: int, num_inputs: int) -> Written:
    """As `quantized_files.fp8`, for matrices that are too large for its loop."""
    generator = torch.Generator().manual_seed(seed)
    codes = (torch.randn(out, num_inputs, generator=generator) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-out // BLOCK_LEN), num_inputs // BLOCK_LEN, generator=generator) * 1e-3 + 1e-4
    spread = scales.repeat_interleave(BLOCK_LEN, 0)[:out].repeat_interleave(BLOCK_LEN, 1)
    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return Written(config, {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread)


WRITERS: dict[str, tuple[str, Callable[..., Written]]] = {
    "gptq": ("cuda_int4", gptq),
    "awq": ("cuda_int4", partial(awq, group_size=64)),
    "fp8": ("cuda_fp8", fp8_blocks),
}


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    with cuda_products():
        yield


@pytest.fixture(scope="module", params=WRITERS)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """The format that it must be held in, a quantized folder, and what it stands for."""
    kind, writer = WRITERS[request.param]
    return kind, *save_twins(tmp_path_factory.mktemp(request.param), "qwen2", writer, **SHAPE)


def kinds(llm: LLM) -> set[str]:
    """Of all matrices but the head."""
    return {linear.matrix.name for linear in llm._engine.executor.runner.decoder.linears[:-1]}


def test_graphs_give_what_eager_steps_give_and_both_what_the_codes_stand_for(twins: tuple[str, Path, Path]) -> None:
    kind, quantized, twin = twins
    prompts = random_forest(1, 4, 90, 24)
    with tiny_llm(twin) as llm:
        expected = llm.generate(prompts, GREEDY)
    found = []
    for enforce_eager in (False, True):
        with gpu_llm(quantized, double_gpu(), enforce_eager=enforce_eager, **OPTIONS) as llm:
            assert kinds(llm) == {kind}
            found.append(llm.generate(prompts, GREEDY))
            assert enforce_eager or graphs_of(llm).counters.graph_steps > 0
    assert [output.outputs[0].token_ids for output in found[0]] == [output.outputs[0].token_ids for output in found[1]]
    for mine, other in zip(found[0], expected, strict=True):
        assert first_logprobs(mine) == pytest.approx(first_logprobs(other), abs=0.3), "bfloat16 and 8-bit inputs"


@pytest.mark.parametrize(("method", "kind"), [("int4", "cuda_int4"), ("q4_k", "cuda_int4"), ("fp8", "cuda_fp8")])
def test_plain_matrices_are_rounded_while_loading_and_the_head_is_not(method: str, kind: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "qwen2", **SHAPE)
    for load_format in ("auto", "dummy"):
        with gpu_llm(folder, double_gpu(), quantization=method, load_format=load_format, **OPTIONS) as llm:
            assert kinds(llm) == {kind}
            assert llm._engine.executor.runner.decoder.lm_head.matrix.name == "dense"
            assert len(llm.generate([[5, 6, 7]], GREEDY)[0].outputs[0].token_ids) == GREEDY.max_tokens
    with pytest.raises(ConfigError, match="quantization='q8_0' has no kernel on a GPU: take q4_k, int4, fp8"):
        gpu_llm(folder, double_gpu(), quantization="q8_0", **OPTIONS)


def first_logprobs(output: Any) -> list[float]:
    """Of the two best tokens at the first position."""
    (first, *_) = output.outputs[0].logprobs
    return [logprob for _, logprob in first.top]


def test_products_take_no_memory_of_the_host(twins: tuple[str, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, quantized, _ = twins
    monkeypatch.setattr(worker, "resolve_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(worker, "step_bytes", lambda *arguments, **options: 0)
    monkeypatch.setattr(worker, "compute_capability", lambda device: None)
    with gpu_llm(quantized, FlashInferDouble(MetaStream(), num_sm=16, exact=True), **OPTIONS) as llm:
        assert kinds(llm) == {kind}
        (output, *_) = llm.generate(random_forest(1, 4, 90, 24), GREEDY)
        assert set(output.outputs[0].token_ids) == {ANY_TOKEN}
        assert graphs_of(llm).counters.graph_steps > 0
