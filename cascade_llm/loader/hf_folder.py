"""A Hugging Face folder: config.json beside safetensors, whole or in shards."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cascade_llm.errors import CheckpointError, ModelNotFoundError
from cascade_llm.loader.checkpoint import Checkpoint

__all__ = ["HuggingFaceCheckpoint", "find_tokenizer", "read_json", "read_optional_json"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; `CheckpointError` when it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, it must hold an object")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; empty when there is no such file."""
    return read_json(path) if path.is_file() else {}


def find_tokenizer(folder: Path) -> Path | None:
    """The folder itself where it holds a tokenizer, else None."""
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None


class HuggingFaceCheckpoint(Checkpoint):
    """A folder with config.json and model.safetensors, or its shards and their index."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder)
        if not (self._folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"{self._folder} has no config.json: give the folder that holds config.json and *.safetensors, "
                "or the path of a .gguf file"
            )
        self._config = read_json(self._folder / "config.json")
        self._generation_config = read_optional_json(self._folder / "generation_config.json")
        self._names_per_file = _names_per_file(self._folder)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self._folder.resolve().name

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self._folder

    @property
    def tokenizer_source(self) -> Path | None:
        """The folder, where it holds a tokenizer."""
        return find_tokenizer(self._folder)

    def hf_config(self) -> dict[str, Any]:
        """config.json."""
        return deepcopy(self._config)

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or nothing."""
        return deepcopy(self._generation_config)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights, file by file, in the order in which they lie there."""
        for path, names in self._names_per_file.items():
            with _opened(path) as file:
                for name in names:
                    try:
                        yield name, file.get_tensor(name)
                    except SafetensorError as error:
                        raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error


def _names_per_file(folder: Path) -> dict[Path, list[str]]:
    """Which tensors to read from which file; every file's header was read and agrees."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: _tensor_names(folder / WEIGHTS)}
    if (folder / INDEX).is_file():
        return _names_per_shard(folder)
    raise _missing_weights(folder)


def _names_per_shard(folder: Path) -> dict[Path, list[str]]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f'{folder / INDEX} has no "weight_map" from tensor to shard: download it again')
    wanted: dict[str, set[str]] = defaultdict(set)
    for name, shard in weight_map.items():
        wanted[shard].add(name)
    names_per_file: dict[Path, list[str]] = {}
    for shard, names in sorted(wanted.items()):
        path = folder / shard
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, {INDEX} names it: download the shard or remove the index")
        present = _tensor_names(path)
        if missing := sorted(names.difference(present)):
            raise CheckpointError(
                f"{path} has no tensor {missing[0]}, {INDEX} places it there ({len(missing)} such): "
                "index and shards are of different models, download both again"
            )
        names_per_file[path] = [name for name in present if name in names]
    return names_per_file


def _tensor_names(path: Path) -> list[str]:
    """In the order of the file, so that it is read from front to back."""
    with _opened(path) as file:
        return list(file.offset_keys())


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): copy or download it again") from error


def _missing_weights(folder: Path) -> CheckpointError:
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    shards = [name for name in files if name.endswith(".safetensors")]
    pickles = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
    if shards:
        return CheckpointError(f"{folder} has {shards[0]} but neither {WEIGHTS} nor {INDEX}: download the index too")
    if pickles:
        return CheckpointError(
            f"{folder} has its weights in {pickles[0]}, a format that runs code when it is loaded: convert it once "
            "with transformers, AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    return CheckpointError(f"{folder} has no weights ({WEIGHTS} or {INDEX}); it holds {', '.join(files)}")
