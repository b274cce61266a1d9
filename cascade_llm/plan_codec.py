"""Step plans and results as bytes: between processes, and in files.

A message is a header (kind, number, length, checksum) and a body of little-endian numbers; columns are raw int32. A
level or a column is sent once: the encoder numbers it by identity, and from then on its number stands for it, so that
a level that did not change is the same object at the other end too. What has died on this side, or was not used for
long, is named in the next message, and the decoder lets it go.

A decoder takes the messages of one encoder in their order, and refuses anything else with `PlanError`: nothing in a
message is executed, and no size is believed before as many bytes are there. `StepPlan.check` is the caller's.
"""

from __future__ import annotations

import json
import struct
import sys
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any
from weakref import ref

from cascade_llm.errors import PlanError, SamplingParamsError
from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import (
    EMPTY,
    CascadeLevel,
    CascadePlan,
    CascadeReport,
    IntColumn,
    LaneStart,
    PageCopy,
    StepPlan,
    StepResult,
    Tier,
    int_column,
)
from cascade_llm.sampling_params import SamplingParams

__all__ = ["PlanDecoder", "PlanEncoder", "decode_result", "encode_result", "is_result"]

MAGIC, VERSION = b"CLLM", 2
PLAN, RESULT = 1, 2
"""Kinds of messages."""
MESSAGE = struct.Struct("<4sBBHQII")
"""Magic, version, kind, 0, number of the message, checksum (CRC-32) and length of the body."""
MAX_KEPT = 4096
"""Levels and columns that an encoder counts on the other end to keep; with those of one message more, the most."""

LEVEL_COLUMNS = ("qo_indptr", "kv_page_indptr", "kv_page_indices", "kv_last_page_len")
STEP_COLUMNS = tuple(field.name for field in fields(StepPlan) if field.type == "IntColumn")
COUNTS = ("num_levels", "num_groups", "grouped_rows", "kv_tokens_read", "kv_tokens_one_level")
NO_TEXT = 2**32 - 1
COUNT, NUMBER, SIGNED = (struct.Struct(f"<{code}") for code in "IQq")
CASCADE, LANE, COPY, REPORT = (struct.Struct(f"<{codes}") for codes in ("IqI", "qqqq", "qqBBB", "5q"))
LOGPROB, TOP = struct.Struct("<qdqI"), struct.Struct("<qd")

Kept = CascadeLevel | IntColumn


class PlanEncoder:
    """Turns the plans of one engine, in their order, into messages."""

    def __init__(self) -> None:
        self._numbers: OrderedDict[int, tuple[int, ref[Kept]]] = OrderedDict()  # by id, the last used at the end
        self._forgotten: list[int] = []
        self._next_number = 1
        self._layer_kinds: tuple[int, ...] = ()
        self._num_messages = 0

    def encode(self, plan: StepPlan) -> bytes:
        """The message of the next plan."""
        body = bytearray(SIGNED.pack(plan.step_id))
        forgotten, self._forgotten = self._forgotten, []
        _put_array(body, array("Q", forgotten))
        body.append(plan.layer_kinds is not self._layer_kinds)
        if plan.layer_kinds is not self._layer_kinds:
            self._layer_kinds = plan.layer_kinds
            _put_array(body, array("i", plan.layer_kinds))
        body += COUNT.pack(len(plan.cascades))
        for cascade in plan.cascades:
            window_len = -1 if cascade.window_len is None else cascade.window_len
            body += CASCADE.pack(cascade.page_size, window_len, len(cascade.levels))
            for level in cascade.levels:
                self._put_level(body, level)
        for name in STEP_COLUMNS:
            self._put_column(body, getattr(plan, name))
        for columns in (plan.window_slots, plan.token_bitmasks):
            body += COUNT.pack(len(columns))
            for column in columns:
                self._put_column(body, column)
        body += COUNT.pack(len(plan.lane_starts))
        for start in plan.lane_starts:
            _put_lane_start(body, start)
        body += COUNT.pack(len(plan.page_copies))
        for copy in plan.page_copies:
            body += COPY.pack(*copy)
        body += REPORT.pack(*[getattr(plan.report, name) for name in COUNTS])
        _put_text(body, plan.report.reason)
        while len(self._numbers) > MAX_KEPT:
            self._forget(next(iter(self._numbers)))
        self._num_messages += 1
        return _message(PLAN, self._num_messages, body)

    def _put_level(self, body: bytearray, level: CascadeLevel) -> None:
        if self._put_number(body, level):
            for name in LEVEL_COLUMNS:
                self._put_column(body, getattr(level, name))

    def _put_column(self, body: bytearray, column: IntColumn) -> None:
        if self._put_number(body, column):
            _put_array(body, column)

    def _put_number(self, body: bytearray, kept: Kept) -> bool:
        """Write what stands for an object; returns whether it is new, so that it has to follow."""
        known = None if kept is EMPTY else self._numbers.get(id(kept))
        if kept is EMPTY or known is not None:
            body += NUMBER.pack(known[0] if known else 0)
            if known:
                self._numbers.move_to_end(id(kept))
            return False
        self._numbers[id(kept)] = self._next_number, ref(kept, partial(self._forget, id(kept)))
        body += NUMBER.pack(self._next_number)
        self._next_number += 1
        return True

    def _forget(self, key: int, _: object = None) -> None:
        self._forgotten.append(self._numbers.pop(key)[0])


class PlanDecoder:
    """Turns the messages of one encoder, in their order, back into plans; a message that is refused changes nothing."""

    def __init__(self) -> None:
        self._kept: dict[int, Kept] = {0: EMPTY}
        self._next_number = 1
        self._layer_kinds: tuple[int, ...] = ()
        self._num_messages = 0

    def decode(self, message: bytes) -> StepPlan:
        """The plan of the next message; `PlanError` for bytes that are damaged, cut off, foreign or out of order."""
        number, body = _body(message, PLAN)
        if number != self._num_messages + 1:
            raise PlanError(f"message {number} where {self._num_messages + 1} was to come: one was lost or repeated")
        reader = _PlanReader(body, self._kept, self._next_number, self._layer_kinds)
        plan = reader.plan()
        for forgotten in reader.forgotten:
            del self._kept[forgotten]
        self._kept.update(reader.new)
        self._next_number, self._layer_kinds = reader.next_number, plan.layer_kinds
        self._num_messages = number
        return plan


def encode_result(result: StepResult) -> bytes:
    """The message of a result."""
    body = bytearray(SIGNED.pack(result.step_id))
    for column in (result.token_ids, result.accepted_counts, sorted(result.failed_samples)):
        _put_array(body, array("i", column))
    _put_text(body, result.failure_detail)
    for logprobs in (result.logprobs, result.prompt_logprobs):
        body += COUNT.pack(len(logprobs))
        for logprob in logprobs:
            body.append(logprob is not None)
            if logprob is not None:
                body += LOGPROB.pack(logprob.token_id, logprob.logprob, logprob.rank, len(logprob.top))
                body += b"".join([TOP.pack(*top) for top in logprob.top])
    return _message(RESULT, 0, body)


def decode_result(message: bytes) -> StepResult:
    """The result of a message; raises as `PlanDecoder.decode`."""
    reader = _Reader(_body(message, RESULT)[1])
    step_id = reader.unpack(SIGNED, "step_id")[0]
    token_ids, accepted_counts, failed = (
        reader.array("i", what).tolist() for what in ("token_ids", "accepted_counts", "failed_samples")
    )
    detail = reader.text("failure_detail")
    logprobs, prompt_logprobs = reader.logprobs("logprobs"), reader.logprobs("prompt_logprobs")
    reader.end()
    return StepResult(
        step_id=step_id,
        token_ids=token_ids,
        accepted_counts=accepted_counts,
        logprobs=logprobs,
        prompt_logprobs=[logprob for logprob in prompt_logprobs if logprob is not None],
        failed_samples=frozenset(failed),
        failure_detail=detail,
    )


def is_result(message: bytes) -> bool:
    """Whether a message holds a result and not a plan."""
    return message[5:6] == bytes([RESULT])


def _message(kind: int, number: int, body: bytes | bytearray) -> bytes:
    return MESSAGE.pack(MAGIC, VERSION, kind, 0, number, zlib.crc32(body), len(body)) + body


def _body(message: bytes, kind: int) -> tuple[int, memoryview]:
    """Number and body of a message of that kind."""
    if len(message) < MESSAGE.size or not message.startswith(MAGIC):
        raise PlanError(f"these {len(message)} bytes are no message of a plan or a result")
    _, version, found, zero, number, checksum, length = MESSAGE.unpack_from(message)
    if version != VERSION or zero:
        raise PlanError(f"the message is of version {version}, this decoder reads version {VERSION}")
    if found != kind:
        raise PlanError(f"the message is of kind {found}, not {kind} (plans {PLAN}, results {RESULT})")
    body = memoryview(message)[MESSAGE.size :]
    if len(body) != length:
        raise PlanError(f"the message has {len(body)} bytes of {length}")
    if zlib.crc32(body) != checksum:
        raise PlanError("the message is damaged: its checksum is another")
    return number, body


def _put_array(body: bytearray, values: array[int] | IntColumn) -> None:
    body += COUNT.pack(len(values))
    if sys.byteorder == "big":
        values = array(values.typecode if isinstance(values, array) else "i", values)
        values.byteswap()
    body += values.tobytes()


def _put_text(body: bytearray, text: str | None) -> None:
    encoded = b"" if text is None else text.encode()
    body += COUNT.pack(NO_TEXT if text is None else len(encoded))
    body += encoded


def _put_lane_start(body: bytearray, start: LaneStart) -> None:
    body += LANE.pack(start.lane, start.epoch, start.seed, start.sample_index)
    params = {field.name: getattr(start.params, field.name) for field in fields(SamplingParams)}
    params["logit_bias"] = list((start.params.logit_bias or {}).items())
    _put_text(body, json.dumps(params, separators=(",", ":")))
    for token_ids in (start.prompt_token_ids, start.output_token_ids, sorted(start.ending_token_ids)):
        _put_array(body, array("i", token_ids))


class _Reader:
    """Takes values from the front of a body; `what` names them where they are not there."""

    def __init__(self, body: memoryview) -> None:
        self._rest = body

    def take(self, num_bytes: int, what: str) -> memoryview:
        """The next bytes."""
        if num_bytes > len(self._rest):
            raise PlanError(f"{what} takes {num_bytes} bytes, {len(self._rest)} are left of the message")
        taken, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return taken

    def unpack(self, form: struct.Struct, what: str) -> tuple[Any, ...]:
        """The values of a struct."""
        return form.unpack(self.take(form.size, what))

    def count(self, what: str, least_bytes: int) -> range:
        """As many numbers as there are entries to come, each of so many bytes at least."""
        count = self.unpack(COUNT, what)[0]
        if count * least_bytes > len(self._rest):
            raise PlanError(f"{count} {what} do not fit the {len(self._rest)} bytes that are left of the message")
        return range(count)

    def array(self, typecode: str, what: str) -> array[int]:
        """An array with its length before it."""
        values = array(typecode)
        values.frombytes(self.take(values.itemsize * self.unpack(COUNT, what)[0], what))
        if sys.byteorder == "big":
            values.byteswap()
        return values

    def text(self, what: str) -> str | None:
        """Text with its length before it."""
        length = self.unpack(COUNT, what)[0]
        try:
            return None if length == NO_TEXT else str(self.take(length, what), "utf-8")
        except UnicodeDecodeError as error:
            raise PlanError(f"{what} is no text: {error}") from None

    def logprobs(self, what: str) -> list[TokenLogprob | None]:
        """Log-probabilities, None where a sample has none."""
        return [self._logprob(what) if self.take(1, what)[0] else None for _ in self.count(what, 1)]

    def end(self) -> None:
        """Raise `PlanError` where anything is left."""
        if self._rest:
            raise PlanError(f"the message has {len(self._rest)} bytes too many")

    def _logprob(self, what: str) -> TokenLogprob:
        token_id, logprob, rank, num_top = self.unpack(LOGPROB, what)
        top = TOP.iter_unpack(self.take(num_top * TOP.size, what))
        return TokenLogprob(token_id, logprob, rank, tuple((token_id, logprob) for token_id, logprob in top))


class _PlanReader(_Reader):
    """Reads one plan, and collects what its message adds to the kept objects and takes from them."""

    def __init__(
        self, body: memoryview, kept: Mapping[int, Kept], next_number: int, layer_kinds: tuple[int, ...]
    ) -> None:
        super().__init__(body)
        self._kept, self._layer_kinds = kept, layer_kinds
        self.next_number = next_number
        self.new: dict[int, Kept] = {}
        self.forgotten: set[int] = set()

    def plan(self) -> StepPlan:
        """The plan, which is all that the body holds."""
        step_id = self.unpack(SIGNED, "step_id")[0]
        self.forgotten.update(self.array("Q", "forgotten numbers"))
        if 0 in self.forgotten or not self.forgotten <= self._kept.keys():
            raise PlanError("the message forgets a level or column that was never sent")
        layer_kinds = self._layer_kinds
        if self.take(1, "layer_kinds")[0]:
            layer_kinds = tuple(self.array("i", "layer_kinds"))
        cascades = tuple(self._cascade() for _ in self.count("cascades", CASCADE.size))
        columns: dict[str, Any] = {name: self._column(name) for name in STEP_COLUMNS}
        plan = StepPlan(
            step_id=step_id,
            cascades=cascades,
            layer_kinds=layer_kinds,
            **columns,
            window_slots=self._columns("window_slots"),
            token_bitmasks=self._columns("token_bitmasks"),
            lane_starts=tuple(self._lane_start() for _ in self.count("lane_starts", LANE.size)),
            page_copies=tuple(self._page_copy() for _ in self.count("page_copies", COPY.size)),
            report=self._report(),
        )
        self.end()
        if len(self._kept) + len(self.new) - len(self.forgotten) > 2 * MAX_KEPT:
            raise PlanError(f"the message brings more levels and columns than can be kept ({2 * MAX_KEPT})")
        return plan

    def _cascade(self) -> CascadePlan:
        page_size, window_len, num_levels = self.unpack(CASCADE, "a cascade")
        levels = tuple(self._level() for _ in range(num_levels))
        return CascadePlan(levels, page_size, None if window_len == -1 else window_len)

    def _level(self) -> CascadeLevel:
        number, kept = self._number("a level")
        if kept is None:
            kept = self.new[number] = CascadeLevel(**{name: self._column(name) for name in LEVEL_COLUMNS})
        if not isinstance(kept, CascadeLevel):
            raise PlanError(f"number {number} stands for a column, not for a level")
        return kept

    def _columns(self, what: str) -> tuple[IntColumn, ...]:
        return tuple(self._column(what) for _ in self.count(what, NUMBER.size))

    def _column(self, what: str) -> IntColumn:
        number, kept = self._number(what)
        if kept is None:
            kept = self.new[number] = int_column(self.array("i", what))
        if isinstance(kept, CascadeLevel):
            raise PlanError(f"{what}: number {number} stands for a level, not for a column")
        return kept

    def _number(self, what: str) -> tuple[int, Kept | None]:
        """The next number and what it stands for; None where that follows."""
        number = self.unpack(NUMBER, what)[0]
        if number == self.next_number:
            self.next_number += 1
            return number, None
        kept = self.new.get(number, self._kept.get(number))
        if kept is None:
            raise PlanError(f"{what}: number {number} was never sent, or is forgotten")
        return number, kept

    def _lane_start(self) -> LaneStart:
        lane, epoch, seed, sample_index = self.unpack(LANE, "a lane start")
        params = self._params(self.text("sampling parameters") or "")
        prompt, output, ending = (
            self.array("i", what).tolist() for what in ("prompt_token_ids", "output_token_ids", "ending_token_ids")
        )
        return LaneStart(lane, epoch, params, seed, sample_index, prompt, output, frozenset(ending))

    def _params(self, text: str) -> SamplingParams:
        try:
            given = json.loads(text)
            return SamplingParams(**{**given, "logit_bias": dict(given["logit_bias"])})
        except SamplingParamsError as error:
            raise PlanError(f"sampling parameters of a lane: {error}") from None
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise PlanError(f"sampling parameters of a lane cannot be read: {error}") from None

    def _report(self) -> CascadeReport:
        counts = dict(zip(COUNTS, self.unpack(REPORT, "report"), strict=True))
        return CascadeReport(**counts, reason=self.text("report"))

    def _page_copy(self) -> PageCopy:
        source, target, source_tier, target_tier, pool = self.unpack(COPY, "a page copy")
        if max(source_tier, target_tier) >= len(Tier):
            raise PlanError(f"a page copy names tier {max(source_tier, target_tier)}, there are {len(Tier)}")
        return PageCopy(source, target, Tier(source_tier), Tier(target_tier), pool)
