from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from cascade_llm.errors import CheckpointError, ModelNotFoundError
from cascade_llm.loader.hf_folder import INDEX, WEIGHTS, HuggingFaceCheckpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.models.decoder import Decoder
from cascade_llm.models.loading import load_weights
from cascade_llm.weights.format import WeightOptions
from tests.models.checkpoints import Replay, hf_config_of, tiny_model


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


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/outside.safetensors", "a/b.safetensors", "..", "", "a\0b"]
)
def test_the_index_never_leaves_the_folder(tmp_path: Path, shard: str) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    (tmp_path / "model" / "a").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, tmp_path / "model" / "a" / "b.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    shard = str(tmp_path / shard[1:]) if shard.startswith("/") else shard
    (tmp_path / "model" / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="no file of this folder"):
        HuggingFaceCheckpoint(tmp_path / "model")


def test_links_of_the_hub_s_cache_are_followed_and_others_are_not(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "repository" / "snapshots" / "0", tmp_path / "repository" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (snapshot / "config.json").write_text("{}")
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    shared, other = tmp_path / "blobs" / "ab", tmp_path / "others" / "ab"
    shared.mkdir(parents=True)
    other.mkdir(parents=True)
    for folder, is_taken in ((blobs, True), (tmp_path, False), (shared, True), (other, False)):
        save_file({"a": torch.ones(1)}, folder / "blob")
        (snapshot / "x.safetensors").unlink(missing_ok=True)
        (snapshot / "x.safetensors").symlink_to(folder / "blob")
        if is_taken:
            assert [name for name, _ in HuggingFaceCheckpoint(snapshot).tensors()] == ["a"]
        else:
            with pytest.raises(CheckpointError, match="no file of this folder"):
                HuggingFaceCheckpoint(snapshot)


@pytest.mark.parametrize("max_shard_size", ["1GB", "50KB"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_head_beside_a_tied_embedding_counts_as_in_transformers(
    tmp_path: Path, trained: bool, max_shard_size: str, caplog: pytest.LogCaptureFixture
) -> None:
    untied, token_ids = tiny_model("llama"), torch.arange(20)[None]
    if not trained:
        untied.lm_head.weight.data.copy_(untied.model.embed_tokens.weight.data)
    saved(untied, tmp_path, max_shard_size)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    assert checkpoint.hf_config()["tie_word_embeddings"] is not trained
    assert ("lm_head.weight" in dict(checkpoint.tensors())) is trained
    assert ("another matrix" in caplog.text) is trained
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    decoder = Decoder(
        model_config_from_hf(checkpoint.hf_config()),
        WeightOptions(dtype=torch.float32, device=torch.device("cpu")),
    )
    load_weights(decoder, checkpoint.stored_tensors())
    with torch.inference_mode():
        expected = theirs(token_ids).logits[0]
    replay = Replay(decoder)
    ours = torch.cat([replay.step([(0, position, position)]) for position in range(20)])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


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
    for content in ("{", "[]", "\ud800", "[" * 10**6, '{"a":' * 10**6, f'{{"a": {"1" * 5000}}}'):
        (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            HuggingFaceCheckpoint(tmp_path)


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json"):
        HuggingFaceCheckpoint(tmp_path)
