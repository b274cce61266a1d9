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
from tests.engine.tiny_llm import assert_equal_outputs, tiny_llm
from tests.loader.quantized_files import WRITERS, Written, gptq, pack_quantized
from tests.loader.table_files import TABLE_WRITERS, bnb4
from tests.models.checkpoints import tiny_model

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
