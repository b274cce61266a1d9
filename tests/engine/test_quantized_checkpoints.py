"""A quantized folder gives the tokens of its dequantized twin, through the whole engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cascade_llm import SamplingParams
from cascade_llm.weights.packed_kernels import reason_against_packed
from tests.engine.tiny_llm import assert_equal_outputs, tiny_llm
from tests.loader.quantized_files import WRITERS, Written, gptq, pack_quantized
from tests.loader.table_files import TABLE_WRITERS, bnb4
from tests.models.checkpoints import tiny_model
from tests.native_code import expect_native

FORMATS: dict[str, Callable[..., Written]] = {
    **WRITERS,
    "gptq": partial(gptq, group_size=16, act_order=True),
    "pack-quantized": partial(pack_quantized, group_size=16, symmetric=False),
    **TABLE_WRITERS,
    "bnb4": partial(bnb4, nested=True),
}


def save_twins(folder: Path, architecture: str, writer: Callable[..., Written], **changes: Any) -> tuple[Path, Path]:
    """A tiny model whose projections are quantized, and the same one with what they stand for."""
    quantized, twin = folder / "quantized", folder / "twin"
    model = tiny_model(architecture, **changes)
    model.save_pretrained(quantized)
    tensors, values = {}, {}
    config: dict[str, object] = {}
    for seed, (name, tensor) in enumerate(model.state_dict().items()):
        if "_proj.weight" not in name:
            tensors[name] = values[name] = tensor
            continue
        written = writer(seed, *tensor.shape)
        config = written.config
        values[name] = written.values
        tensors.update({f"{name[:-6]}{suffix}": part.contiguous() for suffix, part in written.tensors.items()})
    save_file(tensors, quantized / "model.safetensors")
    model.load_state_dict(values)
    model.save_pretrained(twin)
    fields = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps({**fields, "quantization_config": config}))
    return quantized, twin


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_are_those_of_the_dequantized_checkpoint(tmp_path: Path, name: str) -> None:
    architecture = {"awq": "qwen2", "fp8": "qwen3"}.get(name, "llama")
    sizes = {"hidden_size": 96, "intermediate_size": 160} if name == "mxfp4" else {}  # groups of 32
    folders = save_twins(tmp_path, architecture, FORMATS[name], **sizes)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=2)
    prompts = [[5, 6, 7, 8], torch.arange(3, 20).tolist()]
    outputs = []
    for folder in folders:
        with tiny_llm(folder, max_model_len=64, exact_activations=True) as llm:
            outputs.append(llm.generate(prompts, params))
    assert len({token for output in outputs[1] for token in output.outputs[0].token_ids}) > 1
    assert_equal_outputs(*outputs)


@pytest.mark.parametrize(("name", "is_slow"), [("bnb4", True), ("llm-int8", False)])
def test_a_table_of_fractions_is_said_to_be_slow(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, is_slow: bool
) -> None:
    expect_native(reason_against_packed())
    folder, _ = save_twins(tmp_path, "llama", FORMATS[name], hidden_size=96, intermediate_size=160)
    with tiny_llm(folder, max_model_len=64) as llm:
        assert len(llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))[0]["token_ids"]) == 2
    assert ("a table of fractions multiplies inputs as they are" in caplog.text) == is_slow
