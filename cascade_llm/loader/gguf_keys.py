"""The metadata of a GGUF file's own architecture, each key read as what it must be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.loader.gguf_file import GGUFFile

__all__ = ["GGUFKeys"]


class GGUFKeys:
    """`llama.block_count` by `block_count`."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.architecture = str(file.metadata.get("general.architecture"))

    def get(self, name: str, default: object = None) -> Any:
        """Whatever it is."""
        return self.file.metadata.get(f"{self.architecture}.{name}", default)

    def integer(self, name: str, default: int | None = None) -> int:
        """A positive integer, also where every layer has the same."""
        value = self.get(name, default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise self._unusable(name, value, "an integer from 1 to 2147483647")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number: the shortest decimal that is the file's float32, 1e-05 and not 9.99999974e-06."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self._unusable(name, value, "a finite number")
        return float(str(np.float32(value)))

    def _unusable(self, name: str, value: object, wanted: str) -> CheckpointError | UnsupportedModelError:
        if isinstance(value, list) and value:
            return UnsupportedModelError(f"{self.file.path}: {name} differs from layer to layer, not implemented")
        return CheckpointError(f"{self.file.path}: {self.architecture}.{name} is {value!r}, it must be {wanted}")
