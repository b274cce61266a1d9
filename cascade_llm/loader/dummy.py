"""A model's shape without its weights, for benchmarks and tests that need no download."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from cascade_llm.errors import ModelNotFoundError
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.hf_folder import find_tokenizer, read_json, read_optional_json

__all__ = ["DummyCheckpoint"]


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
        self._name, self._tokenizer_source = folder.name, find_tokenizer(folder)
        self._config, self._generation_config = read_json(path), read_optional_json(folder / "generation_config.json")

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

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """None: the model fills its own weights."""
        return iter(())
