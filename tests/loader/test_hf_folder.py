from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from cascade_llm.errors import CheckpointError, ModelNotFoundError
from cascade_llm.loader.hf_folder import INDEX, WEIGHTS, HuggingFaceCheckpoint
from cascade_llm.models.architectures import model_config_from_hf
from tests.models.checkpoints import hf_config_of, tiny_model


def saved(model: PreTrainedModel, folder: Path, max_shard_size: str = "1GB") -> Path:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
def test_tensors_equal_the_saved_model(tmp_path: Path, architecture: str, max_shard_size: str) -> None:
    model = tiny_model(architecture)
    checkpoint = HuggingFaceCheckpoint(saved(model, tmp_path, max_shard_size))
    assert (tmp_path / INDEX).exists() == (max_shard_size == "50KB")
    loaded = list(checkpoint.tensors())
    assert len(loaded) == len(model.state_dict())
    for name, values in loaded:
        assert torch.equal(values, model.state_dict()[name]), name
    assert model_config_from_hf(checkpoint.hf_config()) == model_config_from_hf(hf_config_of(model))


def test_tied_head_is_stored_once(tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(saved(tiny_model("llama", tie_word_embeddings=True), tmp_path))
    names = [name for name, _ in checkpoint.tensors()]
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(saved(tiny_model("llama").bfloat16(), tmp_path))
    assert {values.dtype for _, values in checkpoint.tensors()} == {torch.bfloat16}


def test_configurations_are_the_caller_s_own_copies(tmp_path: Path) -> None:
    checkpoint = HuggingFaceCheckpoint(saved(tiny_model("llama"), tmp_path))
    assert checkpoint.generation_config()["eos_token_id"] == 2
    for read in (checkpoint.hf_config, checkpoint.generation_config):
        before = read()
        read().clear()
        assert read() == before
    (tmp_path / "generation_config.json").unlink()
    assert HuggingFaceCheckpoint(tmp_path).generation_config() == {}


def test_name_and_tokenizer(tmp_path: Path) -> None:
    folder = saved(tiny_model("llama"), tmp_path / "tiny-llama")
    checkpoint = HuggingFaceCheckpoint(folder)
    assert checkpoint.name == "tiny-llama"
    assert not checkpoint.is_dummy
    assert checkpoint.tokenizer_source is None
    (folder / "tokenizer.json").write_text("{}")
    assert HuggingFaceCheckpoint(folder).tokenizer_source == folder


def test_truncated_and_foreign_weights(tmp_path: Path) -> None:
    path = saved(tiny_model("llama"), tmp_path) / WEIGHTS
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:100], whole[:4], b"", b"GGUF" + whole[4:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"{path} is not a whole safetensors file"):
            HuggingFaceCheckpoint(tmp_path)


def test_missing_shard_is_named(tmp_path: Path) -> None:
    saved(tiny_model("llama"), tmp_path, "50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"{shard} is missing"):
        HuggingFaceCheckpoint(tmp_path)


def test_truncated_shard_is_named(tmp_path: Path) -> None:
    saved(tiny_model("llama"), tmp_path, "50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"{shard} is not a whole"):
        HuggingFaceCheckpoint(tmp_path)


def test_index_of_another_model_names_shard_and_tensor(tmp_path: Path) -> None:
    saved(tiny_model("llama"), tmp_path, "50KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    save_file({"other.weight": torch.zeros(2)}, shard)
    with pytest.raises(CheckpointError, match=rf"{shard} has no tensor \S+"):
        HuggingFaceCheckpoint(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}], ids=str)
def test_index_without_map(tmp_path: Path, index: object) -> None:
    saved(tiny_model("llama"), tmp_path, "50KB")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map"):
        HuggingFaceCheckpoint(tmp_path)


def test_tensors_that_the_index_does_not_name_are_left_out(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1), "b": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"b": "model-00001-of-00001.safetensors"}}))
    (tmp_path / "config.json").write_text("{}")
    assert [name for name, _ in HuggingFaceCheckpoint(tmp_path).tensors()] == ["b"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], r"pytorch_model\.bin.*convert it"),
        (["model-00001-of-00002.safetensors"], "download the index"),
        ([], "no weights"),
    ],
)
def test_folders_without_readable_weights(tmp_path: Path, files: list[str], message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        HuggingFaceCheckpoint(tmp_path)


def test_configuration_that_is_no_json_object(tmp_path: Path) -> None:
    saved(tiny_model("llama"), tmp_path)
    for content in ("{", "[]", "\ud800"):
        (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            HuggingFaceCheckpoint(tmp_path)


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        HuggingFaceCheckpoint(tmp_path)
