"""A safetensors file, mapped: tensors are views of it, and what was read can be given back to the system.

Format: https://github.com/safetensors/safetensors, a length, a header of JSON, bytes. The library checks the header; it
offers no way to give pages back while a file is open, so that loading one file of a whole model would take twice its
size.
"""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cascade_llm.errors import CheckpointError

__all__ = ["SafetensorsFile"]

HEADER_LEN_BYTES = 8
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class SafetensorsFile:
    """An opened file; it stays mapped, copy-on-write, as long as this or a tensor of it lives."""

    def __init__(self, path: Path) -> None:
        """Read the header. Raises `CheckpointError` where the file is not whole."""
        self.path = path
        try:
            with safe_open(str(path), framework="pt"):
                pass  # the library compares lengths, offsets and shapes with each other and with the file's size
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}): copy or download it again"
            ) from error
        header_len = int.from_bytes(self._map[:HEADER_LEN_BYTES], "little")
        self._start = HEADER_LEN_BYTES + header_len
        header = json.loads(self._map[HEADER_LEN_BYTES : self._start])
        header.pop("__metadata__", None)
        self._facts: dict[str, dict[str, Any]] = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))

    @property
    def names(self) -> list[str]:
        """Of the tensors, in the order of the file, so that it is read from front to back."""
        return list(self._facts)

    def num_bytes(self, name: str) -> int:
        """What the tensor takes in the file."""
        first, end = self._facts[name]["data_offsets"]
        return int(end - first)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor, from the header."""
        return tuple(self._facts[name]["shape"])

    def type_name(self, name: str) -> str:
        """What the file calls the tensor's dtype."""
        return str(self._facts[name]["dtype"])

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the file in its own dtype and shape; not to be written to.

        Raises `CheckpointError` for a dtype that torch has not.
        """
        facts = self._facts[name]
        if facts["dtype"] not in DTYPES:
            raise CheckpointError(f"{self.path}: tensor {name} has dtype {facts['dtype']}, which is not read")
        dtype, num_bytes = DTYPES[facts["dtype"]], self.num_bytes(name)
        if num_bytes == 0:
            return torch.empty(facts["shape"], dtype=dtype)
        offset = self._start + facts["data_offsets"][0]
        stored = torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=offset)
        if offset % dtype.itemsize:
            stored = stored.clone()
        return stored.view(dtype).view(facts["shape"])

    def release(self, name: str) -> None:
        """Let the system take the memory that reading a tensor has brought in; reading it again brings it back."""
        first, end = (self._start + offset for offset in self._facts[name]["data_offsets"])
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        if hasattr(mmap, "MADV_DONTNEED") and end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)
