"""A GGUF file as a checkpoint: Hugging Face names, shapes and orders."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.gguf_architectures import EXPERT_PARTS, architecture_of
from cascade_llm.loader.gguf_codes import CODED_TYPES, codes_of
from cascade_llm.loader.gguf_config import ending_token_ids, hf_config_of
from cascade_llm.loader.gguf_file import PLAIN_TYPES, GGUFFile, GGUFTensor, dequantize
from cascade_llm.loader.gguf_names import first_part
from cascade_llm.loader.gguf_tensor_names import gguf_name_of, hf_name_of, names_of_experts
from cascade_llm.weights.format import StoredTensor, Unread

__all__ = ["GGUFCheckpoint", "stored_blocks"]

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Read by `gguf_config` into rope_scaling; not weights of the model."""


class GGUFCheckpoint(Checkpoint):
    """A GGUF file, or any part of a split one, in any block type that `gguf` dequantizes."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = GGUFFile(first_part(Path(path)))
        self.path = self._file.path
        metadata = self._file.metadata
        ending_ids = ending_token_ids(self._file)
        super().__init__(
            self._file.path.stem,
            self._file.path if metadata.get("tokenizer.ggml.tokens") else None,
            hf_config_of(self._file),
            {"eos_token_id": ending_ids} if ending_ids else {},
        )
        self._architecture = architecture_of(self._file)
        names = (name for name in self._file.tensors if name not in ROPE_TENSORS)
        self._hf_names = {name: hf_name_of(self._file.path, name, self._architecture) for name in names}
        by_type: Counter[str] = Counter()
        for name in self._hf_names:
            by_type[self._file.tensors[name].type.name] += self._file.tensors[name].num_bytes
        self.bytes_by_type = by_type

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """See `Checkpoint`."""
        for name, hf_name in self._hf_names.items():
            shape = _hf_shape(name, self._file.tensors[name].shape)
            parts = self._expert_parts(name)
            if parts is None:
                yield hf_name, shape
            else:
                sizes = shape[1] // len(parts), *shape[2:]
                yield from ((own, sizes) for own in names_of_experts(hf_name, shape[0], parts))

    def stored_tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """All weights in the order of the file; blocks stay as they are until somebody asks for their values."""
        for name, hf_name in self._hf_names.items():
            tensor = self._file.tensors[name]
            stored = replace(self._stored(tensor), release=partial(self._file.release, tensor))
            parts = self._expert_parts(name)
            if parts is None:
                yield hf_name, stored
            else:
                yield from self._of_experts(hf_name, stored, parts)
            self._file.release(tensor)

    def stored_name(self, name: str) -> str:
        """See `Checkpoint`; of the part of an expert, the tensor of all experts."""
        return gguf_name_of(name, self._architecture, self._file.tensors)

    def _expert_parts(self, name: str) -> tuple[str, ...] | None:
        """Of a tensor that holds all experts, what its outputs are of; None of any other."""
        parts = EXPERT_PARTS.get(name.split(".")[-2]) if self._architecture.has_experts else None
        if parts is not None and len(self._file.tensors[name].shape) != (3 if name.endswith(".weight") else 2):
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(self._file.tensors[name].shape)}: one side must be the experts"
            )
        return parts

    def _of_experts(
        self, hf_name: str, stored: StoredTensor, parts: tuple[str, ...]
    ) -> Iterator[tuple[str, StoredTensor]]:
        """A tensor [experts, outputs of all parts, ...] cut apart."""
        num_rows, names = stored.shape[1] // len(parts), names_of_experts(hf_name, stored.shape[0], parts)
        for expert in range(stored.shape[0]):
            is_matrix = len(stored.shape) == 3
            own = stored.matrix(expert) if is_matrix else StoredTensor.plain(stored.values()[expert])
            for first in range(0, own.shape[0], num_rows):
                yield next(names), own.rows(slice(first, first + num_rows))

    def _stored(self, tensor: GGUFTensor) -> StoredTensor:
        stored = self._in_file_order(tensor)
        order = self._order(tensor)
        return stored if order is None else replace(stored, source=Reordered(stored.data, order))

    def _in_file_order(self, tensor: GGUFTensor) -> StoredTensor:
        data = self._file.data(tensor)
        if tensor.type not in PLAIN_TYPES:
            return stored_blocks(tensor, torch.from_numpy(data).view(math.prod(tensor.shape[:-1]), -1))
        values = dequantize(data, tensor.type, _hf_shape(tensor.name, tensor.shape))
        is_norm, offset = tensor.name.endswith("norm.weight"), self._architecture.norm_offset
        return StoredTensor.plain(values - offset if is_norm and offset else values)

    def _order(self, tensor: GGUFTensor) -> torch.Tensor | None:
        """Where the rows of queries and keys lie, int64 [rows]: a conversion interleaves them. None of all others."""
        part = tensor.name.split(".")[-2]
        if not self._architecture.interleaves_heads or part not in ("attn_q", "attn_k"):
            return None
        num_heads = self._hf_config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
        num_rows = tensor.shape[0]
        if num_rows % (2 * num_heads):
            raise CheckpointError(f"{self._file.path}: {tensor.name} has {num_rows} rows for {num_heads} heads")
        return torch.arange(num_rows).view(num_heads, -1, 2).transpose(1, 2).flatten()


@dataclass(frozen=True, eq=False)
class Reordered(Unread):
    """Rows, be they values or blocks, that lie in another order in the file."""

    stored: torch.Tensor
    """[rows of the file, ...], a view of it."""
    order: torch.Tensor
    """int64 [rows], where each lies there."""

    @property
    def dtype(self) -> torch.dtype:
        """See `Unread`."""
        return self.stored.dtype

    @property
    def num_bytes(self) -> int:
        """See `Unread`."""
        return self.stored[0].nbytes * len(self.order)

    def rows(self, rows: slice) -> Reordered:
        """See `Unread`."""
        return replace(self, order=self.order[rows])

    def columns(self, part: slice) -> StoredTensor | None:
        """See `Unread`."""
        return None

    def read(self) -> torch.Tensor:
        """See `Unread`."""
        return self.stored[self.order]


def stored_blocks(tensor: GGUFTensor, blocks: torch.Tensor) -> StoredTensor:
    """A tensor of a block type from its uint8 `blocks` [rows, bytes of a row], in Hugging Face's order."""
    codes = partial(codes_of, tensor.type) if tensor.type in CODED_TYPES else None
    block_len, block_bytes = GGML_QUANT_SIZES[tensor.type]
    decode = partial(_decoded, tensor.type)
    return StoredTensor(tensor.type.name, tensor.shape, blocks, decode, codes, block=(block_len, block_bytes))


def _decoded(block_type: GGMLQuantizationType, blocks: torch.Tensor) -> torch.Tensor:
    """Float32 values [rows, inputs] of uint8 `blocks` [rows, bytes]."""
    block_len, block_bytes = GGML_QUANT_SIZES[block_type]
    return dequantize(blocks.numpy().reshape(-1), block_type, (len(blocks), blocks.shape[1] // block_bytes * block_len))


def _hf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a tensor in Hugging Face's model: conversions drop the first side of a shared expert's gate, which is 1."""
    return (1, *shape) if name.endswith("ffn_gate_inp_shexp.weight") and len(shape) == 1 else shape
