"""Reading a plan file. Every plan that comes out was checked: a wrong one is an error that names file and line."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cascade_llm.errors import PlanError
from cascade_llm.plan import StepPlan
from cascade_llm.plan_file.header import PlanFileHeader
from cascade_llm.plan_file.limits import PlanLimits
from cascade_llm.plan_file.step_json import StepDecoder

__all__ = ["PlanFileReader", "RecordedStep"]

MAX_IN_FLIGHT = 2
"""Steps whose results may still be to come in the file: an engine plans at most one step ahead."""
RECORD_AGAIN = "the file was edited or damaged, record it again"


@dataclass(slots=True)
class RecordedStep:
    """A step as it was planned, and what it sampled where that was recorded."""

    line: int
    """Where it stands in the file, from 1."""
    plan: StepPlan
    token_ids: list[int | None] | None = None
    """[samples], None where the logits were not finite; None as a whole where the result is not in the file."""


class PlanFileReader:
    """The header and the steps of a plan file, read as they are asked for.

    `with PlanFileReader(path) as reader: for step in reader: ...`
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_truncated: bool = False) -> None:
        """Open a file and read its header.

        allow_truncated: end quietly where the file does, as after a crash; `truncated_at` then says where

        Raises:
            PlanError: no such file, no plan file, or one of another version
        """
        self.path = Path(path).expanduser()
        self.truncated_at: int | None = None
        """The line at which the file breaks off, once iteration has reached it."""
        self._allow_truncated = allow_truncated
        self._line = 0
        self._waiting: deque[RecordedStep] = deque()
        try:
            self._file = gzip.open(self.path, "rb")  # noqa: SIM115, closed by close()
        except OSError as error:
            raise PlanError(f"{self.path} cannot be read ({error.strerror}): give a file of record_plans") from error
        try:
            self.header = self._read_header()
        except PlanError:
            self.close()
            raise
        self._decoder = StepDecoder(token_ids=self.header.token_ids)
        self._limits = PlanLimits(self.header)

    def __iter__(self) -> Iterator[RecordedStep]:
        """All steps in their order. Raises `PlanError` at the first line that is wrong."""
        while (text := self._read_line()) is not None:
            try:
                self._take(self._parse(text))
            except PlanError as error:
                raise self._wrong(f"{error}: {RECORD_AGAIN}") from error.__cause__
            yield from self._settled(MAX_IN_FLIGHT if self.header.token_ids else 0)
        yield from self._settled(0)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_header(self) -> PlanFileHeader:
        try:
            text = self._read_line()
            if text is None:
                raise PlanError('the file is empty: record one with LLM(..., record_plans="plans.jsonl.gz")')
            return PlanFileHeader.from_json(self._parse(text))
        except PlanError as error:
            if str(error).startswith(str(self.path)):
                raise
            raise self._wrong(str(error)) from error.__cause__

    def _read_line(self) -> bytes | None:
        """The next line; None at the end, which may be early where that is allowed."""
        self._line += 1
        try:
            text = self._file.readline()
        except EOFError:
            self._break_off("the file breaks off here, as after a crash")
            return None
        except gzip.BadGzipFile as error:
            raise self._wrong(f"{error}: a plan file is gzip-compressed, {RECORD_AGAIN}") from None
        except (OSError, zlib.error) as error:
            raise self._wrong(f"it cannot be decompressed ({error}): {RECORD_AGAIN}") from None
        if text and not text.endswith(b"\n"):
            self._break_off("the last line is not complete")
            return None
        return text or None

    def _break_off(self, what: str) -> None:
        if not self._allow_truncated or self._line == 1:
            cure = "allow a truncated file to use the steps before" if self._line > 1 else "record it again"
            raise self._wrong(f"{what}: {cure}")
        self.truncated_at = self._line

    def _parse(self, text: bytes) -> Mapping[str, Any]:
        try:
            line = json.loads(text)
        except ValueError as error:
            raise PlanError(f"not JSON ({error})") from None
        if not isinstance(line, dict):
            raise PlanError(f"it holds a JSON {type(line).__name__}, not an object")
        return line

    def _take(self, line: Mapping[str, Any]) -> None:
        if "result" in line:
            self._take_result(line)
            return
        plan = self._decoder.decode(line)
        plan.check()
        self._limits.check(plan)
        self._waiting.append(RecordedStep(self._line, plan))

    def _take_result(self, line: Mapping[str, Any]) -> None:
        step = next((step for step in self._waiting if step.plan.step_id == line["result"]), None)
        if step is None or step.token_ids is not None:
            raise PlanError(f"a result of step {line['result']!r}, which does not wait for one")
        token_ids, num_samples = line.get("token_ids"), len(step.plan.sample_rows)
        if not isinstance(token_ids, list) or len(token_ids) != num_samples:
            raise PlanError(f"the result of step {line['result']} must have {num_samples} token ids")
        self._limits.check_token_ids("the result", [token_id for token_id in token_ids if token_id is not None])
        step.token_ids = token_ids

    def _settled(self, max_waiting: int) -> Iterator[RecordedStep]:
        """Steps that have their result, or will not get one."""
        while self._waiting and (len(self._waiting) > max_waiting or self._waiting[0].token_ids is not None):
            yield self._waiting.popleft()

    def _wrong(self, what: str) -> PlanError:
        return PlanError(f"{self.path}, line {self._line}: {what}")
