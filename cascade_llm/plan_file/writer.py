"""Writing a plan file: gzip-compressed JSON lines, readable up to the last whole line after a crash."""

from __future__ import annotations

import gzip
import json
import os
import warnings
import zlib
from pathlib import Path
from typing import Any

from cascade_llm.errors import ConfigError
from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.plan_file.header import PlanFileHeader
from cascade_llm.plan_file.step_json import StepEncoder

__all__ = ["PlanFileWriter"]

COMPRESSION_LEVEL = 4


class PlanFileWriter:
    """Records the steps of one engine.

    The first line is the header. A step's line is written before the step runs, so that a step which crashes the
    process is in the file; with token ids a line with the step's sampled tokens follows once they are known.
    """

    def __init__(self, path: str | os.PathLike[str], *, token_ids: bool) -> None:
        """Open `path`, replacing a file that is there; `begin` comes next.

        Raises `ConfigError` where it cannot be written.
        """
        self._path = Path(path).expanduser()
        self._token_ids = token_ids
        self._encoder = StepEncoder(token_ids=token_ids)
        try:
            self._file: gzip.GzipFile | None = gzip.GzipFile(self._path, "wb", compresslevel=COMPRESSION_LEVEL, mtime=0)
        except OSError as error:
            raise ConfigError(
                f"record_plans is {str(path)!r}, which cannot be written ({error.strerror}): give a file in a folder "
                "that exists"
            ) from error

    def begin(self, header: PlanFileHeader) -> None:
        """Write the header, once."""
        assert header.token_ids == self._token_ids
        self._write(header.to_json())

    def write_step(self, plan: StepPlan) -> None:
        """Record a step that is about to run."""
        if self._file is not None:
            self._write(self._encoder.encode(plan))

    def write_result(self, result: StepResult) -> None:
        """Record what a step sampled, where token ids are wanted; null where logits were not finite."""
        if self._file is not None and self._token_ids:
            failed = result.failed_samples
            tokens = [None if i in failed else token_id for i, token_id in enumerate(result.token_ids)]
            self._write({"result": result.step_id, "token_ids": tokens})

    def close(self) -> None:
        """Complete the file; a second call does nothing."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._warn(error)

    def _write(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        text = json.dumps(line, separators=(",", ":"))
        try:
            self._file.write(text.encode() + b"\n")
            self._file.flush(zlib.Z_SYNC_FLUSH)
        except OSError as error:  # a full disk must not end the requests that are served
            self._warn(error)
            self._file = None

    def _warn(self, error: OSError) -> None:
        warnings.warn(
            f"{self._path}: recording of step plans ended ({error.strerror}), generation goes on",
            RuntimeWarning,
            stacklevel=3,
        )
