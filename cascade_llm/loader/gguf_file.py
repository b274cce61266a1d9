"""The GGUF container, versions 2 and 3, whole or in parts: metadata, table of tensors, their bytes mapped from disk.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader makes numpy views
of every string of the vocabulary, 2 s for 50 thousand tokens; this one takes 0.1 s, and checks every length against
the file's end. Values of block types are computed by the package.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.loader.gguf_names import PART_NAME
from cascade_llm.loader.gguf_texts import LENGTH, GGUFTexts, text_at

__all__ = ["PLAIN_TYPES", "GGUFFile", "GGUFTensor", "dequantize", "is_gguf"]

MAGIC, VERSIONS, MAX_DIMS = b"GGUF", (2, 3), 4
PLAIN_TYPES = {
    GGMLQuantizationType.F32: torch.float32,
    GGMLQuantizationType.F16: torch.float16,
    GGMLQuantizationType.BF16: torch.bfloat16,
}
CHUNK_LEN = 65536
"""Values that are computed at a time: their float32 temporaries stay in a core's cache, three times as fast as the
package's own groups of 16 rows at 576 columns, and the peak is the tensor itself instead of twice that."""

FAULT_AROUND_BYTES = 1 << 16
"""What Linux maps beside a byte that is read: the end of the tensor before comes back with the first of the next."""

SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where a tensor lies, and in which block type."""

    name: str
    shape: tuple[int, ...]
    """Outermost dimension first, as in torch; the file has the reverse."""
    type: GGMLQuantizationType
    offset: int
    """From the start of the file, bytes."""
    num_bytes: int


def is_gguf(path: Path) -> bool:
    """Whether a file is of this format, by its first bytes: whatever it is called."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class GGUFFile:
    """An opened GGUF file; `CheckpointError` names the first thing in it that cannot be.

    Of a split file the first part is opened, and brings the tensors of the others. Files are mapped copy-on-write and
    stay mapped as long as this, or an array from `data`, lives.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._open(Path(path))
        count = self._split("count", 1)
        self._parts = dict.fromkeys(self.tensors, self._map)
        for number in range(1, count):
            self._add_part(number, count)
        total = self._split("tensors.count", len(self.tensors))
        if count > 1 and total != len(self.tensors):
            raise CheckpointError(
                f"{self.path}: its parts hold {len(self.tensors)} tensors of {total}: copy them again"
            )

    def _split(self, name: str, default: int) -> int:
        value = self.metadata.get(f"split.{name}", default)
        if not isinstance(value, int):
            raise CheckpointError(f"{self.path}: split.{name} is {value!r}, it must be an integer")
        return value

    def _add_part(self, number: int, count: int) -> None:
        match = PART_NAME.fullmatch(self.path.name)
        if match is None or (int(match["number"]), int(match["count"])) != (1, count):
            raise CheckpointError(
                f"{self.path} is one of {count} parts: give the first, and name them all as they were split: "
                f"NAME-00001-of-{count:05d}.gguf"
            )
        path = self.path.with_name(f"{match['stem']}-{number + 1:05d}-of-{match['count']}{self.path.suffix}")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, {self.path.name} is one of {count} parts: copy it there")
        part = GGUFFile.__new__(GGUFFile)
        part._open(path)
        if (part._split("no", -1), part._split("count", -1)) != (number, count):
            raise CheckpointError(f"{path} says that it is another part, or of another file: copy it again")
        if twice := part.tensors.keys() & self.tensors.keys():
            raise CheckpointError(f"{path}: tensor {min(twice)} is in an earlier part too, the files are corrupt")
        self.tensors.update(part.tensors)
        self._parts.update(dict.fromkeys(part.tensors, part._map))

    def release(self, tensor: GGUFTensor) -> None:
        """Let the system take the memory that reading a tensor has brought in; reading it again brings it back."""
        start = max(0, tensor.offset - FAULT_AROUND_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED"):
            self._parts[tensor.name].madvise(mmap.MADV_DONTNEED, start, tensor.offset + tensor.num_bytes - start)

    def _open(self, path: Path) -> None:
        self.path = path
        self._map = self._mapped()
        cursor = _Cursor(self.path, self._map)
        num_tensors, num_keys = self._read_head(cursor)
        self.metadata: dict[str, Any] = {cursor.string(): cursor.value() for _ in range(num_keys)}
        """Every key of the file; arrays of numbers as lists, of texts as `GGUFTexts`."""
        table = [self._read_tensor(cursor) for _ in range(num_tensors)]
        start = self._data_start(cursor.position)
        self.tensors: dict[str, GGUFTensor] = {}
        for name, shape, tensor_type, offset in table:
            self._add_tensor(name, shape, tensor_type, start + offset)

    def data(self, tensor: GGUFTensor) -> npt.NDArray[np.uint8]:
        """[num_bytes], the tensor's bytes in the map of its part, not copied."""
        return np.frombuffer(self._parts[tensor.name], np.uint8, tensor.num_bytes, tensor.offset)

    def _mapped(self) -> mmap.mmap:
        with self.path.open("rb") as file:
            head = file.read(len(MAGIC))
            if head != MAGIC:
                raise CheckpointError(f"{self.path} is not a GGUF file: it starts with {head!r}, not {MAGIC!r}")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def _read_head(self, cursor: _Cursor) -> tuple[int, int]:
        cursor.position = len(MAGIC)
        (version,) = cursor.unpack("I")
        if version not in VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            reason = "of big-endian byte order" if big_endian else f"of version {version}"
            raise CheckpointError(f"{self.path} is GGUF {reason}: versions 2 and 3, little-endian, are read")
        num_tensors, num_keys = cursor.unpack("QQ")
        return num_tensors, num_keys

    def _read_tensor(self, cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = cursor.string()
        (num_dims,) = cursor.unpack("I")
        if num_dims > MAX_DIMS:
            raise CheckpointError(f"{self.path}: tensor {name} has {num_dims} dimensions, the file is corrupt")
        shape = tuple(reversed(cursor.unpack(f"{num_dims}Q")))
        type_id, offset = cursor.unpack("IQ")
        try:
            return name, shape, GGMLQuantizationType(type_id), offset
        except ValueError:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name} has block type {type_id}, which the installed gguf package does not "
                "know: upgrade gguf, or use the model in another quantization"
            ) from None

    def _data_start(self, position: int) -> int:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise CheckpointError(f"{self.path}: general.alignment is {alignment!r}, the file is corrupt")
        return -(-position // alignment) * alignment

    def _add_tensor(self, name: str, shape: tuple[int, ...], tensor_type: GGMLQuantizationType, offset: int) -> None:
        block_len, block_bytes = GGML_QUANT_SIZES[tensor_type]
        row_len = shape[-1] if shape else 1
        if row_len % block_len:
            raise CheckpointError(
                f"{self.path}: tensor {name} has rows of {row_len}, no multiple of {tensor_type.name}'s {block_len}"
            )
        num_bytes = math.prod(shape) // block_len * block_bytes
        if offset + num_bytes > len(self._map):
            raise CheckpointError(
                f"{self.path} is truncated: tensor {name} ends at byte {offset + num_bytes}, the file has "
                f"{len(self._map)}: copy or download it again"
            )
        if name in self.tensors or offset % 8:
            raise CheckpointError(f"{self.path}: tensor {name} is there twice or misplaced, the file is corrupt")
        self.tensors[name] = GGUFTensor(name, shape, tensor_type, offset, num_bytes)


def dequantize(data: npt.NDArray[np.uint8], tensor_type: GGMLQuantizationType, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of `shape` from its bytes [num_bytes]: F32, F16, BF16 as views of them, block types as new float32.

    Raises `UnsupportedModelError` for a type that the `gguf` package cannot dequantize.
    """
    if tensor_type in PLAIN_TYPES:
        return torch.from_numpy(data).view(PLAIN_TYPES[tensor_type]).view(shape)
    return _dequantize_blocks(data, tensor_type).view(shape)


def _dequantize_blocks(data: npt.NDArray[np.uint8], tensor_type: GGMLQuantizationType) -> torch.Tensor:
    block_len, block_bytes = GGML_QUANT_SIZES[tensor_type]
    blocks_per_chunk = max(1, CHUNK_LEN // block_len)
    out = torch.empty(data.size // block_bytes * block_len, dtype=torch.float32)
    values = out.numpy()
    try:
        for block in range(0, data.size // block_bytes, blocks_per_chunk):
            chunk = data[block * block_bytes : (block + blocks_per_chunk) * block_bytes]
            start = block * block_len
            values[start : start + chunk.size // block_bytes * block_len] = gguf.dequantize(chunk[None], tensor_type)[0]
    except NotImplementedError as error:
        raise UnsupportedModelError(f"block type {tensor_type.name} cannot be dequantized: {error}") from error
    return out


class _Cursor:
    """Reads little-endian values in order and refuses to pass the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data = path, data
        self.position = 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{layout}")
        self._require(size)
        values = struct.unpack_from(f"<{layout}", self._data, self.position)
        self.position += size
        return values

    def string(self) -> str:
        start = self.position
        (size,) = self.unpack("Q")
        self._require(size)
        self.position += size
        return text_at(self._path, self._data, start)

    def value(self) -> Any:
        kind = self._kind()
        if kind is not GGUFValueType.ARRAY:
            return self.string() if kind is GGUFValueType.STRING else self.unpack(SCALAR_FORMATS[kind])[0]
        kind = self._kind()
        (count,) = self.unpack("Q")
        if kind is GGUFValueType.ARRAY:
            raise CheckpointError(f"{self._path}: an array of arrays at byte {self.position} cannot be read")
        if kind is GGUFValueType.STRING:
            return self._texts(count)
        self._require(count)
        return list(self.unpack(f"{count}{SCALAR_FORMATS[kind]}"))

    def _texts(self, count: int) -> GGUFTexts:
        """`count` times `string`, a vocabulary in 0.02 s."""
        data, position, length_at, starts = self._data, self.position, LENGTH.unpack_from, array("Q")
        self._require(count * LENGTH.size)
        try:
            for _ in range(count):
                starts.append(position)
                position += LENGTH.size + length_at(data, position)[0]
        except (struct.error, OverflowError):  # a length that leads beyond the file
            position = len(data) + 1
        self.position = position
        self._require(0)
        return GGUFTexts(self._path, data, starts)

    def _kind(self) -> GGUFValueType:
        (kind,) = self.unpack("I")
        try:
            return GGUFValueType(kind)
        except ValueError:
            raise CheckpointError(
                f"{self._path}: unknown value type {kind} before byte {self.position}, the file is corrupt"
            ) from None

    def _require(self, num_bytes: int) -> None:
        if self.position + num_bytes > len(self._data):
            raise CheckpointError(
                f"{self._path} is truncated: its header goes on after byte {len(self._data)}, where the file ends: "
                "copy or download it again"
            )
