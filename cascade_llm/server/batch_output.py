"""The file of a batch's answers: what it holds already, and what is added."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from cascade_llm.errors import ConfigError

__all__ = ["BatchOutput"]

BEGINNING = b'{"id": "batch_'
"""Of every record."""


class BatchOutput:
    """Records, one a line; a line is there whole, or is dropped by the next run.

    Raises `ConfigError` for a file that cannot be written, that another run writes, or that holds anything else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror}): give a file in a folder") from None
        self.answered: set[str] = set()
        """The custom_ids of records."""
        self._nameless: set[int] = set()
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise

    @property
    def num_records(self) -> int:
        """All that is there."""
        return len(self.answered) + len(self._nameless)

    def has_error(self, number: int, custom_id: str | None) -> bool:
        """Whether there is a record of a line that failed: by its number where it has no custom_id of its own."""
        return number in self._nameless if custom_id is None else custom_id in self.answered

    def write(self, record: Mapping[str, Any]) -> None:
        """Add a record; it is with the system when this returns. Text that is no Unicode is escaped."""
        self._note(record)
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _begin(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"another run writes {self._path}: wait for its end, or give another name") from None
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):  # the run before was cut off in the middle of it
                if not line.startswith(BEGINNING[: len(line)]):
                    raise self._foreign(number)
                break
            self._read(number, line)
            whole += len(line)
        os.truncate(self._file.fileno(), whole)

    def _read(self, number: int, line: bytes) -> None:
        try:
            if not line.startswith(BEGINNING):
                raise ValueError
            self._note(json.loads(line))
        except (ValueError, LookupError, TypeError, RecursionError):
            raise self._foreign(number) from None

    def _note(self, record: Mapping[str, Any]) -> None:
        if record["custom_id"] is not None:
            self.answered.add(record["custom_id"])
        else:
            self._nameless.add(record["error"]["line"])

    def _foreign(self, number: int) -> ConfigError:
        return ConfigError(f"{self._path}, line {number}, is no answer of a batch: give another name for the answers")
