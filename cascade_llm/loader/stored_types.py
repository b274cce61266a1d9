"""Every type that a weight may have in a file, with a small matrix of each: what serves it is asked with that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cascade_llm.errors import UnsupportedModelError
from cascade_llm.loader.gguf_architectures import GGUF_ARCHITECTURES
from cascade_llm.loader.gguf_checkpoint import stored_blocks
from cascade_llm.loader.gguf_file import PLAIN_TYPES, GGUFTensor
from cascade_llm.loader.quantized.examples import quantized_examples
from cascade_llm.loader.safetensors_file import DTYPES
from cascade_llm.weights.format import StoredTensor

__all__ = ["StoredType", "stored_types"]

ROWS, INPUTS = 64, 1024
"""Of the matrix: whole blocks of every type, and of every kernel."""
FILLING = 0x10
"""Of blocks: whatever the type, values are finite and not all zero."""
GGUF_CLASSES = frozenset(name for held in GGUF_ARCHITECTURES.values() for name in (held.hf_class, *held.also_holds))
NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
"""GGUF types of indices, and of activations within llama.cpp."""


@dataclass(frozen=True)
class StoredType:
    """A type of one kind of file."""

    container: str
    """"GGUF" or "safetensors"."""
    name: str
    """As `StoredTensor.format` has it, and for plain values as the container calls their dtype."""
    example: StoredTensor | None
    """A matrix [ROWS, INPUTS]; None where the type is not read."""
    reason: str | None = None
    """Why it is not read."""
    hf_classes: frozenset[str] | None = None
    """Whose models this container holds; None where it holds all."""

    own_bits: float | None = None
    """Of a weight in the file, where the example is of other bytes."""

    @property
    def file_bits(self) -> float | None:
        """Of a weight in the file."""
        if self.own_bits is not None:
            return self.own_bits
        return None if self.example is None else 8 * self.example.data.nbytes / (ROWS * INPUTS)


def stored_types() -> Iterator[StoredType]:
    """All of them, in the order of the containers' own tables."""
    for block_type in GGML_QUANT_SIZES:
        if block_type.name not in NO_WEIGHTS:
            yield _gguf_type(block_type)
    for name, dtype in DTYPES.items():
        if dtype.is_floating_point and dtype.itemsize > 1:
            yield StoredType("safetensors", name, StoredTensor.plain(torch.ones(ROWS, INPUTS, dtype=dtype)))
    for name, bits, example in quantized_examples(ROWS, INPUTS):
        yield StoredType("safetensors", name, example, own_bits=bits)


def _gguf_type(block_type: GGMLQuantizationType) -> StoredType:
    if block_type in PLAIN_TYPES:
        plain = StoredTensor.plain(torch.ones(ROWS, INPUTS, dtype=PLAIN_TYPES[block_type]))
        return StoredType("GGUF", block_type.name, plain, None, GGUF_CLASSES)
    block_len, block_bytes = GGML_QUANT_SIZES[block_type]
    row_bytes = INPUTS // block_len * block_bytes
    tensor = GGUFTensor("example", (ROWS, INPUTS), block_type, 0, ROWS * row_bytes)
    example = stored_blocks(tensor, torch.full((ROWS, row_bytes), FILLING, dtype=torch.uint8))
    try:
        example.values()
    except UnsupportedModelError as error:
        return StoredType("GGUF", block_type.name, None, str(error), GGUF_CLASSES)
    return StoredType("GGUF", block_type.name, example, None, GGUF_CLASSES)
