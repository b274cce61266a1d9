"""What every way to store quantized matrices is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from reprlib import repr as short_repr
from typing import Any

import torch

from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.loader.quantized.grid import Grid, stored_matrix, unpaired
from cascade_llm.loader.quantized.parts import MatrixParts
from cascade_llm.weights.format import StoredTensor

__all__ = [
    "MatrixFormat",
    "QuantizedFormat",
    "is_listed",
    "names_of",
    "number_of",
    "unpacked_words",
    "unsupported",
    "words_of",
]


class QuantizedFormat(ABC):
    """A `quantization_config`, as far as it says how matrices are stored.

    Its constructor takes that mapping, and refuses what nobody implements before a tensor is looked at. Rounded
    activations are no reason to refuse: without that rounding a model is closer to the one that was quantized.
    """

    method: str
    """`quant_method`."""
    markers: tuple[str, ...]
    """Suffixes of tensors that only a quantized matrix has; they may have dots."""
    suffixes: tuple[str, ...]
    """Of all that is read of one."""
    unread: tuple[str, ...] = ()
    """Suffixes of what concerns activations alone."""
    coded_types: tuple[str, ...] = ()
    """Types, in safetensors' words, that a "NAME.weight" has only where it is quantized."""
    input_bits: int | None = None
    """What the configuration rounds activations to, where a user would expect that it is done: it is not."""

    @abstractmethod
    def is_ignored(self, name: str) -> bool:
        """Whether the configuration says that a layer is not quantized."""

    @abstractmethod
    def check(self, parts: MatrixParts) -> None:
        """Look at headers and the small tensors. Raises `CheckpointError` for all that is wrong with them."""

    @abstractmethod
    def shapes(self, parts: MatrixParts) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The names of `tensors`, and their shapes."""

    @abstractmethod
    def tensors(self, parts: MatrixParts) -> Iterator[tuple[str, StoredTensor]]:
        """What is stored under a name: a name below it, and the tensor."""

    def stored_name(self, name: str) -> str:
        """See `Checkpoint.stored_name`."""
        return name


class MatrixFormat(QuantizedFormat):
    """Each name is one matrix [out, in]."""

    @abstractmethod
    def grid(self, parts: MatrixParts) -> Grid:
        """From headers and the small tensors. Raises `CheckpointError` for all that is wrong with them."""

    @abstractmethod
    def codes(self, parts: MatrixParts, rows: slice, inputs: slice) -> torch.Tensor:
        """See `CodeReader`; nothing else is read."""

    def kind(self, parts: MatrixParts) -> str:
        """What messages call the matrix's format."""
        return self.method

    def check(self, parts: MatrixParts) -> None:
        """See `QuantizedFormat`."""
        self.grid(parts)

    def shapes(self, parts: MatrixParts) -> Iterator[tuple[str, tuple[int, ...]]]:
        """See `QuantizedFormat`."""
        yield "weight", self.grid(parts).shape

    def tensors(self, parts: MatrixParts) -> Iterator[tuple[str, StoredTensor]]:
        """See `QuantizedFormat`."""
        yield "weight", self.read(parts)

    def read(self, parts: MatrixParts) -> StoredTensor:
        """A matrix [out, in]; scales and zero points are read, codes are not yet."""
        stored = stored_matrix(self.kind(parts), self.grid(parts), partial(self.codes, parts))
        return replace(stored, release=partial(parts.release, self.suffixes))


def unsupported(what: str, instead: str) -> UnsupportedModelError:
    """`what`: the part of quantization_config that nobody implements."""
    return UnsupportedModelError(f"config.json: quantization_config has {what}, which is not implemented; {instead}")


def number_of(config: Mapping[str, Any], *names: str) -> int:
    """The first field that is there, which must be an integer."""
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if type(value) is not int:
        raise CheckpointError(
            f"config.json: quantization_config: {names[0]} is {short_repr(value)}: it must be an integer; use the "
            "config.json that was saved with these weights"
        )
    return value


def names_of(config: Mapping[str, Any], *fields: str) -> tuple[str, ...]:
    """The names of all the lists that are there."""
    found: list[str] = []
    for field in fields:
        value = config.get(field)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise CheckpointError(
                f"config.json: quantization_config: {field} is {short_repr(value)}: it must be a list of texts"
            )
        found += value
    return tuple(found)


def is_listed(name: str, entries: Iterable[str]) -> bool:
    """Whether an entry is part of a dotted name, by whole words: "mlp.gate" is no part of "mlp.gate_proj"."""
    return any(f".{entry}." in f".{name}." for entry in entries)


def words_of(codes: slice, per_word: int) -> tuple[slice, slice]:
    """The words that some codes lie in, and where these lie in what the words hold."""
    first = codes.start // per_word
    own = slice(codes.start - first * per_word, codes.stop - first * per_word, codes.step)
    return slice(first, -(-codes.stop // per_word)), own


def unpacked_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of int32 words [rows, words], lowest bits first: uint8 [rows, words * 32 / bits]."""
    stored = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return stored if bits == 8 else unpaired(stored)
