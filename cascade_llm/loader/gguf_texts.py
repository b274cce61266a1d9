"""An array of texts in a GGUF file, such as a vocabulary and its merges."""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import final

from cascade_llm.errors import CheckpointError

__all__ = ["GGUFTexts", "text_at"]

LENGTH = struct.Struct("<Q")


@final
class GGUFTexts:
    """Texts that stay in the mapped file: each is decoded when it is asked for.

    A vocabulary of 50 thousand tokens and its merges are 10 MB of Python's texts.
    """

    def __init__(self, path: Path, data: mmap.mmap, starts: array[int]) -> None:
        """Keep where they are.

        Args:
            path: of the file, for messages
            data: the file
            starts: where the 8 bytes of each text's length are; texts behind them lie within the file
        """
        self._path, self._data, self._starts = path, data, starts

    def __len__(self) -> int:
        """How many there are."""
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        """One of them. Raises `CheckpointError` where it is not UTF-8."""
        return text_at(self._path, self._data, self._starts[index])

    def __iter__(self) -> Iterator[str]:
        """All in their order, faster than one by one; raises as for one."""
        data, head_bytes, length_at = self._data, LENGTH.size, LENGTH.unpack_from
        for start in self._starts:
            begin = start + head_bytes
            try:
                yield data[begin : begin + length_at(data, start)[0]].decode()
            except UnicodeDecodeError:
                text_at(self._path, data, start)  # says what is wrong


def text_at(path: Path, data: mmap.mmap, start: int) -> str:
    """The text whose 8 bytes of length are at byte `start` of a file; all of it lies within the file.

    Raises `CheckpointError` where it is not UTF-8.
    """
    begin = start + LENGTH.size
    try:
        return data[begin : begin + LENGTH.unpack_from(data, start)[0]].decode()
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: the text at byte {begin} is not UTF-8, the file is corrupt") from None
