"""A Hugging Face folder: config.json beside safetensors, whole or in shards; read, written, or without its weights."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cascade_llm.errors import CheckpointError, ModelNotFoundError
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.weights.format import StoredTensor

__all__ = ["DummyCheckpoint", "HuggingFaceCheckpoint", "write_hf_folder"]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 2 << 30
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def _read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; `CheckpointError` when it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, it must hold an object")
    return value


def _read_optional_json(path: Path) -> dict[str, Any]:
    """As `_read_json`; empty when there is no such file."""
    return _read_json(path) if path.is_file() else {}


def _find_tokenizer(folder: Path) -> Path | None:
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
        self._config = _read_json(self._folder / "config.json")
        self._generation_config = _read_optional_json(self._folder / "generation_config.json")
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
        return _find_tokenizer(self._folder)

    def hf_config(self) -> dict[str, Any]:
        """config.json."""
        return deepcopy(self._config)

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or nothing."""
        return deepcopy(self._generation_config)

    def stored_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """All weights, file by file, in the order in which they lie there."""
        for path, names in self._names_per_file.items():
            with _opened(path) as file:
                for name in names:
                    try:
                        yield name, StoredTensor.plain(file.get_tensor(name))
                    except SafetensorError as error:
                        raise CheckpointError(f"{path}: tensor {name} cannot be read: {error}") from error


class DummyCheckpoint(Checkpoint):
    """A configuration alone: a folder with config.json, a config.json itself, another checkpoint, or a dict of it.

    Raises `ModelNotFoundError` when there is no config.json, `CheckpointError` when it is not JSON.
    """

    def __init__(self, source: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint) -> None:
        self._name, self._tokenizer_source = "dummy", None
        self._generation_config: dict[str, Any] = {}
        if isinstance(source, Mapping):
            self._config = deepcopy(dict(source))
        elif isinstance(source, Checkpoint):
            self._name, self._tokenizer_source = source.name, source.tokenizer_source
            self._config, self._generation_config = source.hf_config(), source.generation_config()
        else:
            self._read(Path(source))

    def _read(self, source: Path) -> None:
        path = source if source.is_file() else source / "config.json"
        if not path.is_file():
            raise ModelNotFoundError(f"{path} does not exist: dummy weights need the model's config.json")
        folder = path.resolve().parent
        self._name, self._tokenizer_source = folder.name, _find_tokenizer(folder)
        self._config, self._generation_config = _read_json(path), _read_optional_json(folder / "generation_config.json")

    @property
    def name(self) -> str:
        """The folder's name, or "dummy"."""
        return self._name

    @property
    def is_dummy(self) -> bool:
        """True."""
        return True

    @property
    def tokenizer_source(self) -> Path | None:
        """The folder, where it holds a tokenizer."""
        return self._tokenizer_source

    def hf_config(self) -> dict[str, Any]:
        """The configuration as given."""
        return deepcopy(self._config)

    def generation_config(self) -> dict[str, Any]:
        """The folder's generation_config.json, where there is one."""
        return deepcopy(self._generation_config)

    def stored_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """None: the model fills its own weights."""
        return iter(())


def write_hf_folder(
    checkpoint: Checkpoint, folder: Path, dtype: torch.dtype, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write config.json, generation_config.json and all weights in `dtype`; the tokenizer is left to others.

    Weights go to shards, so that memory never holds more than one of them. The folder must exist.
    """
    config = {**checkpoint.hf_config(), "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if generation := checkpoint.generation_config():
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2), encoding="utf-8")
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    num_shards = size = total = 0
    for name, tensor in checkpoint.tensors():
        shard[name] = tensor.to(dtype).contiguous().clone()
        size += shard[name].nbytes
        if size >= shard_bytes:
            num_shards, total, size = num_shards + 1, total + size, 0
            _write_shard(folder, num_shards, shard, weight_map)
    if shard:
        num_shards, total = num_shards + 1, total + size
        _write_shard(folder, num_shards, shard, weight_map)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _names_per_file(folder: Path) -> dict[Path, list[str]]:
    """Which tensors to read from which file; every file's header was read and agrees."""
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: _tensor_names(folder / WEIGHTS)}
    if (folder / INDEX).is_file():
        return _names_per_shard(folder)
    raise _missing_weights(folder)


def _names_per_shard(folder: Path) -> dict[Path, list[str]]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
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


def _write_shard(folder: Path, number: int, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> None:
    file = f"model-{number:05d}.safetensors"
    save_file(shard, folder / file, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(shard, file))
    shard.clear()
