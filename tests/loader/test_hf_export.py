"""A checkpoint written as a Hugging Face folder is the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cascade_llm.loader.hf_folder import write_hf_folder
from cascade_llm.loader.resolve import open_checkpoint
from tests.models.checkpoints import tiny_model


@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_copy_has_the_same_weights_and_configuration(tmp_path: Path, shard_bytes: int, dtype: torch.dtype) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path / "model")
    source, target = open_checkpoint(tmp_path / "model"), tmp_path / "copy"
    target.mkdir()
    write_hf_folder(source, target, dtype, shard_bytes=shard_bytes)
    copy = open_checkpoint(target)
    ours, theirs = dict(copy.tensors()), dict(source.tensors())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor.to(dtype)), name
    assert copy.hf_config() == {**source.hf_config(), "dtype": str(dtype).removeprefix("torch.")}
    assert copy.generation_config() == source.generation_config()
    assert (len(list(target.glob("*.safetensors"))) > 1) == (shard_bytes < 1 << 30)


def test_transformers_loads_the_copy(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "copy").mkdir()
    write_hf_folder(open_checkpoint(tmp_path / "model"), tmp_path / "copy", torch.float32, shard_bytes=40_000)
    ids = torch.tensor([[3, 5, 7, 11]])
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
        assert torch.equal(loaded(ids).logits, model(ids).logits)
