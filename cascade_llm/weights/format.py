"""What every weight format is: a matrix as it is stored, and its product.

A matrix W [out_features, in_features] is fused of named parts that lie below each other: q, k and v, or gate and up.
Its parts come one by one from a checkpoint. When all are there, `select.build_matrix` looks at how they are stored and
builds the matrix in the format that multiplies it fastest.

A new format is a file with a subclass of `WeightFormat`, and a line in the table of `select`. A rank's shard is cut
from the stored tensor, by rows or by columns, before it is loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeAlias

import torch

from cascade_llm.device.huge_pages import MemoryRange
from cascade_llm.device.ranks import Share
from cascade_llm.weights.codes import Codes

__all__ = ["MatrixSpec", "Refusal", "StoredTensor", "Unread", "WeightFormat", "WeightOptions"]

Refusal: TypeAlias = tuple[str, str]
"""A format, and a reason against it."""
PLAIN = "plain"
CHUNK_LEN = 1 << 20
"""Values that are decoded at a time, so that a large matrix does not stand in memory twice."""


class Unread(ABC):
    """Rows of data that a file holds in another order, or in pieces: only what is left after all cuts is read."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the data."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of what is left, about as many as in the file."""

    @abstractmethod
    def rows(self, rows: slice) -> Unread:
        """Some of them."""

    @abstractmethod
    def columns(self, part: slice) -> StoredTensor | None:
        """The tensor of some inputs, with start and stop; None where they are cut out of what was read."""

    @abstractmethod
    def read(self) -> torch.Tensor:
        """What `StoredTensor.data` is."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of a checkpoint as its file holds it; often a view of the file, so it is not written to."""

    format: str
    """"plain", or the name of a block type, such as GGUF's "Q4_1"."""
    shape: tuple[int, ...]
    """Of the values."""
    source: torch.Tensor | Unread
    """`data`, or what reads it."""
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    """Turns rows of `data` into as many rows of float32 values; None where it holds the values."""
    codes: Callable[[torch.Tensor], Codes] | None = None
    """Turns rows of `data` into as many rows of codes, exact to the bit; None where there is no layout for them."""

    release: Callable[[], None] = lambda: None
    """Gives back the memory that reading a view of a file has brought in; reading it again brings it back."""
    block: tuple[int, int] | None = None
    """Where rows of `data` are blocks that `decode` and `codes` take alone: the inputs of one, and its bytes."""

    @classmethod
    def plain(cls, values: torch.Tensor, release: Callable[[], None] = lambda: None) -> StoredTensor:
        """Values [...] of any shape and dtype, not copied."""
        return cls(PLAIN, tuple(values.shape), values, release=release)

    @cached_property
    def data(self) -> torch.Tensor:
        """Plain: the values. Else the stored bytes, uint8 [rows, bytes of a row]. Read when it is first asked for."""
        return self.source.read() if isinstance(self.source, Unread) else self.source

    @property
    def dtype(self) -> torch.dtype:
        """Of `data`."""
        return self.source.dtype

    @property
    def num_bytes(self) -> int:
        """In the file."""
        return self.source.num_bytes if isinstance(self.source, Unread) else self.source.nbytes

    def rows(self, rows: slice) -> StoredTensor:
        """Some rows along the first dimension, as they are stored."""
        source = self.source.rows(rows) if isinstance(self.source, Unread) else self.source[rows]
        count = len(range(*rows.indices(self.shape[0])))
        return replace(self, shape=(count, *self.shape[1:]), source=source)

    def matrix(self, index: int) -> StoredTensor:
        """One of the matrices of a stack [matrices, rows, inputs], as it is stored."""
        count, rows, _ = self.shape
        data = self.data.view(count, rows, -1) if self.decode is not None else self.data
        return replace(self, shape=self.shape[1:], source=data[index])

    def columns(self, part: slice) -> StoredTensor:
        """Some inputs of a matrix, as they are stored where that can be cut there, else decoded as they are read.

        Args:
            part: of the inputs, with start and stop
        """
        _, inputs = self.shape
        if part.start == 0 and part.stop == inputs:
            return self
        if isinstance(self.source, Unread) and (cut := self.source.columns(part)) is not None:
            return replace(cut, release=self.release)
        return self._columns_of_data(part)

    def _columns_of_data(self, part: slice) -> StoredTensor:
        shape = self.shape[0], part.stop - part.start
        if self.decode is None:
            return replace(self, shape=shape, source=self.data[:, part])
        data, rest = self.data, part
        if self.block is not None:
            block_len, num_bytes = self.block
            first, end = part.start // block_len, -(-part.stop // block_len)
            data = data[:, first * num_bytes : end * num_bytes]
            rest = slice(part.start - first * block_len, part.stop - first * block_len)
        cut = _Columns(self.decode, self.codes, rest)
        has_codes = self.codes is not None and len(data) > 0 and cut.codes_or_none(data[:1]) is not None
        return replace(
            self, shape=shape, source=data, block=None, decode=cut.decode, codes=cut.codes if has_codes else None
        )

    def values(self) -> torch.Tensor:
        """The values [*shape]: a view of the file where they are plain, else new float32 ones."""
        return self.data if self.decode is None else self.decode(self.data).view(self.shape)

    def write_to(self, out: torch.Tensor) -> None:
        """Write the values into contiguous memory [*shape], in its dtype; few of them are decoded at a time."""
        if self.decode is None:
            out.copy_(self.data)
            return
        rows = out.view(len(self.data), -1)
        step = max(1, CHUNK_LEN // rows.shape[1])
        for first in range(0, len(rows), step):
            rows[first : first + step] = self.decode(self.data[first : first + step])


@dataclass(frozen=True)
class _Columns:
    """Cuts what rows of data are turned into."""

    whole_decode: Callable[[torch.Tensor], torch.Tensor]
    whole_codes: Callable[[torch.Tensor], Codes] | None
    part: slice

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        return self.whole_decode(rows.contiguous())[:, self.part]

    def codes_or_none(self, rows: torch.Tensor) -> Codes | None:
        assert self.whole_codes is not None
        return self.whole_codes(rows.contiguous()).columns(self.part)

    def codes(self, rows: torch.Tensor) -> Codes:
        codes = self.codes_or_none(rows)
        assert codes is not None
        return codes


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """What decides the formats of a model's matrices, beside their shapes."""

    dtype: torch.dtype
    """Of activations and products."""
    device: torch.device
    quantization: str | None = None
    """What plain matrices are rounded to as they are loaded; a key of `quantize.QUANTIZERS`."""
    exact_activations: bool = False
    """Whether products with quantized matrices leave their inputs as they are."""
    on_stream: bool = False
    """Whether products are queued on a GPU's stream, for which a kernel of the host would not wait."""
    arch: tuple[int, int] | None = None
    """Compute capability of the GPU; None where there is none."""


@dataclass(frozen=True)
class MatrixSpec:
    """A matrix [out_features, in_features] before it has values."""

    name: str
    """What messages call it, such as "qkv"."""
    in_features: int
    parts: Mapping[str, int]
    """The rows of each part, by its name in a checkpoint, in their order in the matrix."""
    options: WeightOptions
    inputs: Share | None = None
    """This rank's, where each has some: its products are then summed over all ranks."""
    outputs: Mapping[str, Share] = field(default_factory=dict)
    """This rank's rows of each part, where each has some."""

    @property
    def held(self) -> MatrixSpec:
        """The matrix that this rank holds."""
        if self.inputs is None and not self.outputs:
            return self
        in_features = self.in_features if self.inputs is None else self.inputs.size
        parts = {part: self.outputs[part].size if self.outputs else rows for part, rows in self.parts.items()}
        return MatrixSpec(self.name, in_features, parts, self.options)

    def held_part(self, part: str, stored: StoredTensor) -> StoredTensor:
        """What this rank holds of a part of the matrix [rows, in_features], or of its bias [rows]."""
        if self.outputs:
            stored = stored.rows(self.outputs[part].slice)
        return stored if self.inputs is None or len(stored.shape) == 1 else stored.columns(self.inputs.slice)

    @property
    def out_features(self) -> int:
        """Rows of all parts."""
        return sum(self.parts.values())

    def rows_of(self, part: str) -> slice:
        """Where a part lies."""
        names = list(self.parts)
        first = sum(self.parts[name] for name in names[: names.index(part)])
        return slice(first, first + self.parts[part])


class WeightFormat(ABC):
    """A matrix W [out_features, in_features] in one format, on one device."""

    name: str
    """Of the format."""
    refused: tuple[Refusal, ...] = ()
    """What spoke against formats that are preferred to this one; `select` tells."""

    @abstractmethod
    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y = x Wᵀ + bias.

        Args:
            x: [rows, in_features], the model's dtype
            bias: [out_features]
            out: [rows, out_features], where y is written; default new memory

        Returns:
            y [rows, out_features], x's dtype
        """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Memory that the matrix takes."""

    @property
    def memory(self) -> tuple[MemoryRange, ...]:
        """Of the host, that each product reads and that is this matrix's own; empty where that is not known."""
        return ()

    @property
    def note(self) -> str | None:
        """What is slow about its products; None where nothing is."""
        return None

    def describe(self) -> str:
        """For the log."""
        return self.name
