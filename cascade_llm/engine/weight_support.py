"""Which architectures in which types of weights this machine serves, and by what: asked, not listed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from cascade_llm.device.devices import compute_capability, resolve_device, resolve_dtype
from cascade_llm.loader.stored_types import StoredType, stored_types
from cascade_llm.models.architectures import ARCHITECTURES
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat, WeightOptions
from cascade_llm.weights.select import build_matrix

__all__ = ["TypeSupport", "held_matrix", "weight_support"]

AS_LARGE = 1.5
"""Times the bits in the file: a matrix that takes more is not kept in its own bits."""
MIN_PLAIN_BITS = 16


@dataclass(frozen=True, kw_only=True)
class TypeSupport:
    """How a type of weights is served here."""

    container: str
    """"GGUF" or "safetensors"."""
    type: str
    file_bits: float | None
    """Of a weight in the file."""
    memory_bits: float | None
    """Of a weight in memory; None where the type is not read."""
    held_as: str | None
    """The weight format that multiplies it."""
    architectures: tuple[str, ...]
    """Keys of `ARCHITECTURES` that may come in it."""
    note: str | None
    """Why it is not read, that no kernel multiplies it in its own bits, or what is slow about its products."""

    @property
    def growth(self) -> float:
        """Bytes in memory over bytes in the file; 1 where the type is not read."""
        return 1.0 if self.file_bits is None or self.memory_bits is None else self.memory_bits / self.file_bits

    @property
    def is_plain(self) -> bool:
        """Whether values stand in memory, and no codes."""
        return self.memory_bits is not None and self.memory_bits >= MIN_PLAIN_BITS


def weight_support(dtype: str = "auto", device: str = "auto") -> Iterator[TypeSupport]:
    """Every type that a file may hold, as an engine with these options would hold it."""
    where = resolve_device(device)
    options = WeightOptions(dtype=resolve_dtype(dtype, "bfloat16", where), device=where, arch=compute_capability(where))
    for stored_type in stored_types():
        yield _support(stored_type, options)


def held_matrix(stored: StoredTensor, options: WeightOptions) -> WeightFormat:
    """A matrix [out, in] in the format that the options give it, ready to multiply."""
    spec = MatrixSpec("example", stored.shape[1], {"example": stored.shape[0]}, options)
    return build_matrix(spec, {"example": stored})


def _support(stored_type: StoredType, options: WeightOptions) -> TypeSupport:
    example = stored_type.example
    classes = stored_type.hf_classes
    served = tuple(name for name, kind in ARCHITECTURES.items() if classes is None or kind.hf_class in classes)
    if example is None:
        return TypeSupport(
            container=stored_type.container,
            type=stored_type.name,
            file_bits=None,
            memory_bits=None,
            held_as=None,
            architectures=(),
            note=f"not read: {stored_type.reason}",
        )
    with torch.inference_mode():
        matrix = held_matrix(example, options)
    row = TypeSupport(
        container=stored_type.container,
        type=stored_type.name,
        file_bits=stored_type.file_bits,
        memory_bits=8 * matrix.num_bytes / (example.shape[0] * example.shape[1]),
        held_as=matrix.name,
        architectures=served,
        note=matrix.note,
    )
    return row if row.growth <= AS_LARGE else replace(row, note="no kernel: decoded while loading")
