"""What a model on disk is, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from cascade_llm.weights.format import StoredTensor

__all__ = ["Checkpoint"]


class Checkpoint(ABC):
    """A model's configuration, weights and tokenizer, in the terms of a Hugging Face folder.

    Opening one reads headers only and raises `CheckpointError` for files that are broken, so that a start fails
    before memory is taken; weights are read by `stored_tensors()`.
    """

    is_dummy = False
    """Whether there are no weights on disk: the model fills itself with random ones."""
    path: Path | None = None
    """The folder or file that opens it again; None where it came from memory."""
    bytes_by_type: Mapping[str, int] = MappingProxyType({})
    """What the weights of each type take in their files, by the type's name there; empty where there are none."""

    def __init__(
        self,
        name: str,
        tokenizer_source: Path | None,
        hf_config: Mapping[str, Any],
        generation_config: Mapping[str, Any],
    ) -> None:
        """Keep what the headers say.

        Args:
            name: what to call the model: the folder's or file's name
            tokenizer_source: the folder or .gguf file that holds the tokenizer; None if there is none
            hf_config: the fields of Hugging Face's config.json
            generation_config: those of generation_config.json, possibly none
        """
        self.name, self.tokenizer_source = name, tokenizer_source
        self._hf_config, self._generation_config = hf_config, generation_config

    @property
    def num_bytes(self) -> int:
        """What the weights take in their files; 0 where there are none."""
        return sum(self.bytes_by_type.values())

    @property
    def main_type(self) -> str | None:
        """The type that takes the most bytes; None where there are no weights."""
        return max(self.bytes_by_type, key=lambda name: self.bytes_by_type[name], default=None)

    def hf_config(self) -> dict[str, Any]:
        """The fields of config.json; the caller's own copy."""
        return deepcopy(dict(self._hf_config))

    def generation_config(self) -> dict[str, Any]:
        """The fields of generation_config.json, possibly none; the caller's own copy."""
        return deepcopy(dict(self._generation_config))

    @abstractmethod
    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names of `stored_tensors` with their shapes, from headers alone."""

    @abstractmethod
    def stored_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Each weight once, as the file holds it: (Hugging Face name, a tensor in the order of Hugging Face's model).

        One tensor is read at a time, so that peak memory stays near the largest.
        """

    def stored_name(self, name: str) -> str:
        """What its files call the tensor that `shapes` calls `name`, or would call it where it is missing."""
        return name

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The values of `stored_tensors`, on the CPU: in the file's own dtype, float32 where blocks are decoded.

        A tensor may be a view of the file: copy it, and do not write to it.
        """
        return ((name, stored.values()) for name, stored in self.stored_tensors())
