"""What a model on disk is, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cascade_llm.weights.format import StoredTensor

__all__ = ["Checkpoint"]


class Checkpoint(ABC):
    """A model's configuration, weights and tokenizer, in the terms of a Hugging Face folder.

    Opening one reads headers only and raises `CheckpointError` for files that are broken, so that a start fails
    before memory is taken; weights are read by `stored_tensors()`.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What to call the model: the folder's or file's name."""

    @property
    def is_dummy(self) -> bool:
        """Whether there are no weights on disk: the model fills itself with random ones."""
        return False

    @property
    @abstractmethod
    def tokenizer_source(self) -> Path | None:
        """The folder or .gguf file that holds the tokenizer; None if the checkpoint has none."""

    @abstractmethod
    def hf_config(self) -> dict[str, Any]:
        """The fields of Hugging Face's config.json; the caller's own copy."""

    @abstractmethod
    def generation_config(self) -> dict[str, Any]:
        """The fields of generation_config.json, possibly none; the caller's own copy."""

    @abstractmethod
    def stored_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Each weight once, as the file holds it: (Hugging Face name, a tensor in the order of Hugging Face's model).

        One tensor is read at a time, so that peak memory stays near the largest.
        """

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The values of `stored_tensors`, on the CPU: in the file's own dtype, float32 where blocks are decoded.

        A tensor may be a view of the file: copy it, and do not write to it.
        """
        return ((name, stored.values()) for name, stored in self.stored_tensors())
