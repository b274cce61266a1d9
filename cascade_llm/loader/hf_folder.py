"""A Hugging Face folder: config.json beside safetensors, whole or in shards; read, written, or without its weights."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cascade_llm.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.quantized.matrices import check_quantized, quantized_shapes, read_quantized
from cascade_llm.loader.quantized.select import quantized_format
from cascade_llm.loader.safetensors_file import SafetensorsFile
from cascade_llm.weights.format import StoredTensor

__all__ = ["DummyCheckpoint", "HuggingFaceCheckpoint", "read_json", "write_hf_folder"]

log = logging.getLogger("cascade_llm")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OLDER_CONFIG, MODELOPT_CONFIG = "quantize_config.json", "hf_quant_config.json"
SHARD_BYTES = 2 << 30
ADAPTER = "adapter_config.json"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class HuggingFaceCheckpoint(Checkpoint):
    """A folder with config.json and model.safetensors, or its shards and their index."""

    def __init__(self, folder: str | os.PathLike[str], name: str | None = None) -> None:
        """`name`: what to call the model; None is the folder's name."""
        self.folder = self.path = Path(folder)
        if not (self.folder / "config.json").is_file():
            _refuse_adapter(self.folder)
            raise ModelNotFoundError(
                f"{self.folder} has no config.json: give the folder that holds config.json and *.safetensors, "
                "or the path of a .gguf file"
            )
        generation_config = _read_optional_json(self.folder / "generation_config.json")
        super().__init__(
            name or self.folder.resolve().name,
            _find_tokenizer(self.folder),
            read_json(self.folder / "config.json"),
            generation_config,
        )
        self._names_per_file = _names_per_file(self.folder)
        if self._hf_config.get("tie_word_embeddings") is True:
            self._settle_head()
        self.bytes_by_type = _bytes_by_type(self._names_per_file)
        if not self._hf_config.get("quantization_config"):
            self._take_config_beside()
        self._quantized = quantized_format(self._hf_config)
        if self._quantized is not None:
            check_quantized(self._quantized, self._homes())

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """See `Checkpoint`."""
        homes = self._homes()
        if self._quantized is not None:
            return quantized_shapes(self._quantized, homes)
        return ((name, file.shape(name)) for name, file in homes.items())

    def stored_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """All weights, file by file, in the order in which they lie there; a tied head once, as the embedding."""
        if self._quantized is not None:
            yield from read_quantized(self._quantized, self._homes())
            return
        for path, names in self._names_per_file.items():
            file = SafetensorsFile(path)
            for name in names:
                yield name, StoredTensor.plain(file.tensor(name), partial(file.release, name))
                file.release(name)

    def stored_name(self, name: str) -> str:
        """See `Checkpoint`."""
        return name if self._quantized is None else self._quantized.stored_name(name)

    def _take_config_beside(self) -> None:
        """modelopt, and older tools for GPTQ, tell bits and groups in a file of their own; it counts where codes are
        there."""
        suffixes = {name.rpartition(".")[2] for names in self._names_per_file.values() for name in names}
        for file, method, suffix in ((OLDER_CONFIG, "gptq", "qweight"), (MODELOPT_CONFIG, "modelopt", "weight_scale")):
            if suffix in suffixes and (self.folder / file).is_file():
                found = {"quant_method": method, **read_json(self.folder / file)}
                self._hf_config = {**self._hf_config, "quantization_config": found}

    def _homes(self) -> dict[str, SafetensorsFile]:
        """The file of every tensor: those of a quantized matrix may lie in several."""
        homes = {}
        for path, names in self._names_per_file.items():
            homes.update(dict.fromkeys(names, SafetensorsFile(path)))
        return homes

    def _settle_head(self) -> None:
        """A head beside a tied embedding is left out where it is equal, and untied where it is another.

        That is what transformers does: the file's head is what was trained.
        """
        paths = {name: path for path, names in self._names_per_file.items() for name in names}
        if HEAD not in paths or EMBEDDING not in paths:
            return
        head, embedding = (SafetensorsFile(paths[name]).tensor(name) for name in (HEAD, EMBEDDING))
        if head.shape == embedding.shape and torch.equal(head, embedding.to(head.dtype)):
            self._names_per_file[paths[HEAD]].remove(HEAD)
            return
        log.warning(
            "%s: config.json ties the head to the embedding, but %s is another matrix: it is used", self.folder, HEAD
        )
        self._hf_config = {**self._hf_config, "tie_word_embeddings": False}


class DummyCheckpoint(Checkpoint):
    """A model's shape without its weights, for benchmarks and tests that need no download.

    Raises `ModelNotFoundError` when there is no config.json, `CheckpointError` when it is not JSON.
    """

    is_dummy = True

    def __init__(
        self, source: str | os.PathLike[str] | Mapping[str, Any] | Checkpoint, name: str | None = None
    ) -> None:
        """`source`: a folder with config.json, a config.json itself, the fields of one, or another checkpoint; `name`:
        what to call the model, None is the source's."""
        if isinstance(source, Mapping):
            super().__init__("dummy", None, deepcopy(dict(source)), {})
        elif isinstance(source, Checkpoint):
            super().__init__(source.name, source.tokenizer_source, source.hf_config(), source.generation_config())
            self.path = source.path
        else:
            path = Path(source) if Path(source).is_file() else Path(source) / "config.json"
            if not path.is_file():
                raise ModelNotFoundError(f"{path} does not exist: dummy weights need the model's config.json")
            folder = path.resolve().parent
            generation_config = _read_optional_json(folder / "generation_config.json")
            super().__init__(name or folder.name, _find_tokenizer(folder), read_json(path), generation_config)
            self.path = path

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """None."""
        return iter(())

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
    for name in ("torch_dtype", "quantization_config"):
        config.pop(name, None)
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
        return {folder / WEIGHTS: SafetensorsFile(folder / WEIGHTS).names}
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
        if not _is_inside(folder, shard):
            raise CheckpointError(f"{folder / INDEX}: weight_map names {shard!r}, which is no file of this folder")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, {INDEX} names it: download the shard or remove the index")
        present = SafetensorsFile(path).names
        if missing := sorted(names.difference(present)):
            raise CheckpointError(
                f"{path} has no tensor {missing[0]}, {INDEX} places it there ({len(missing)} such): "
                "index and shards are of different models, download both again"
            )
        names_per_file[path] = [name for name in present if name in names]
    return names_per_file


def _bytes_by_type(names_per_file: Mapping[Path, list[str]]) -> Mapping[str, int]:
    found: Counter[str] = Counter()
    for path, names in names_per_file.items():
        file = SafetensorsFile(path)
        for name in names:
            found[file.type_name(name)] += file.num_bytes(name)
    return found


def _is_inside(folder: Path, shard: str) -> bool:
    """Whether a shard is a file beside its index; the hub's cache holds links to the blobs of the same repository, and
    these may be links to blobs/XX/HASH, which all repositories of the cache share."""
    if Path(shard).name != shard or shard in (".", "..") or "\0" in shard:
        return False
    folder, target = folder.resolve(), (folder / shard).resolve()
    if target.parent == folder or folder.parent.name != "snapshots":
        return target.parent == folder
    repository = folder.parent.parent
    return target.parent == repository / "blobs" or target.parent.parent == repository.parent / "blobs"


def _refuse_adapter(folder: Path) -> None:
    """A LoRA folder has no model of its own."""
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise UnsupportedModelError(
            f"{folder} is a LoRA adapter of {base!r}, not a whole model: merge the two with peft, "
            "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(new_folder)"
        )


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


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds; `CheckpointError` when it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable as JSON ({error}): copy or download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, it must hold an object")
    return value


def _read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; empty when there is no such file."""
    return read_json(path) if path.is_file() else {}


def _find_tokenizer(folder: Path) -> Path | None:
    """The folder itself where it holds a tokenizer, else None."""
    return folder if any((folder / name).is_file() for name in TOKENIZER_FILES) else None
