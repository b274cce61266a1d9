"""Step plans in a file, so that a bug report is a file.

The file is a magic line and frames: two lengths, then a message as a flushed part of one zlib stream. The first frame
is the header, what must be known to run the steps elsewhere; then come plans and results as `plan_codec` writes them,
and the stream's end. A step's frame is with the system before the step runs: after a crash the file is whole up to it.

Every plan that a reader gives out was checked. A wrong one is an error that names file and frame.
"""

from __future__ import annotations

import gzip
import json
import os
import struct
import warnings
import zlib
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cascade_llm.config import ModelConfig
from cascade_llm.errors import ConfigError, PlanError
from cascade_llm.plan import EMPTY, CascadePlan, LaneStart, StepPlan, StepResult, Tier, int_column
from cascade_llm.plan_codec import PlanDecoder, PlanEncoder, decode_result, encode_result, is_result

__all__ = ["PlanFileHeader", "PlanFileReader", "PlanFileWriter", "RecordedStep"]

FORMAT = "cascade-llm step plans"
FORMAT_VERSION = 3
"""Grows when an older reader would misread a file."""
MAGIC = b"cascade-llm step plans\n"
GZIP_MAGIC = b"\x1f\x8b"
FRAME = struct.Struct("<II")
"""Bytes of the frame that follow, and bytes of the message in it; 0 in the last frame."""
MAX_FRAME_BYTES = 1 << 28
MAX_IN_FLIGHT = 2
"""Steps whose results may still be to come in the file: an engine plans at most one step ahead."""
COMPRESSION_LEVEL = 4
RECORD_ONE = 'record one with LLM(..., record_plans="engine.plans")'
RECORD_AGAIN = "the file was edited or damaged, record it again"

DTYPES = ("float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", *DTYPES, "fp8_e4m3", "int8")
MODEL_FIELDS = ("num_layers", "num_qo_heads", "num_kv_heads", "head_dim", "vocab_size")
"""Fields that belong to the model and are called the same in its configuration."""
INTEGERS = (*MODEL_FIELDS, "page_size", "max_model_len", "max_num_seqs")
"""Fields that must be integers, 1 or larger."""


@dataclass(frozen=True, kw_only=True)
class PlanFileHeader:
    """Model, pools and limits of the engine whose steps were recorded."""

    cascade_llm: str
    """The package's version."""
    model: str
    """What the checkpoint calls itself."""
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    sm_scale: float
    dtype: str
    """Of the computation: float32 | bfloat16 | float16."""
    page_size: int
    pool_pages: list[int]
    """Pages of the pool of all attention kinds, or of the pool of each kind; none has more than the first."""
    max_model_len: int
    max_num_seqs: int
    """Lanes."""
    token_ids: bool
    """Whether token ids were recorded, those that were sampled and the users' stop strings with them."""
    kv_cache_dtype: str
    """Of the KV pool: auto (as `dtype`) | float32 | bfloat16 | float16 | fp8_e4m3 | int8."""
    attention_soft_cap: float | None
    """Attention's scores s became cap * tanh(s / cap)."""

    def to_json(self) -> dict[str, Any]:
        """The first frame's object."""
        return {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, given: object) -> PlanFileHeader:
        """Read the first frame's object; `PlanError` for another format or version, or fields that make no sense."""
        if not isinstance(given, Mapping) or given.get("format") != FORMAT:
            raise PlanError(f"this is no plan file: {RECORD_ONE}")
        writer = given.get("cascade_llm", "unknown")
        if given.get("version") != FORMAT_VERSION:
            raise PlanError(
                f"format {given.get('version')!r} was written by cascade-llm {writer}, this one reads format "
                f"{FORMAT_VERSION}: replay it with cascade-llm {writer}, or record it again with this one"
            )
        names = [each.name for each in fields(cls)]
        missing = [name for name in names if name not in given]
        if missing:
            raise PlanError(f"the header lacks {', '.join(missing)}: record the file again")
        header = cls(**{name: given[name] for name in names})
        header.check()
        return header

    def check(self) -> None:
        """Raise `PlanError` for a field out of range."""
        for name in INTEGERS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise PlanError(f"the header's {name} is {value!r}, it must be an integer, 1 or larger")
        if self.num_qo_heads % self.num_kv_heads:
            raise PlanError(f"{self.num_qo_heads} query heads cannot be shared out over {self.num_kv_heads} KV heads")
        for name, known in (("dtype", DTYPES), ("kv_cache_dtype", KV_CACHE_DTYPES)):
            if getattr(self, name) not in known:
                raise PlanError(f"the header's {name} is {getattr(self, name)!r}, it must be one of {', '.join(known)}")
        for name in ("sm_scale", "attention_soft_cap"):
            value = getattr(self, name)
            if (value is not None or name == "sm_scale") and not (
                isinstance(value, float) and 0 < value < float("inf")
            ):
                raise PlanError(f"the header's {name} is {value!r}, it must be a positive number")
        pages: object = self.pool_pages
        if not isinstance(pages, list) or not pages or not all(type(n) is int and 1 <= n <= pages[0] for n in pages):
            raise PlanError(
                f"the header's pool_pages is {pages!r}, it must be integers of 1 or more, none larger than the first"
            )
        if not isinstance(self.token_ids, bool):
            raise PlanError(f"the header's token_ids is {self.token_ids!r}, it must be true or false")

    def check_model(self, model_name: str, model: ModelConfig) -> None:
        """Raise `PlanError` unless a model has the recorded one's shape."""
        differing = [
            f"{name} {getattr(self, name)} (here {getattr(model, name)})"
            for name in MODEL_FIELDS
            if getattr(self, name) != getattr(model, name)
        ]
        num_pools, num_kinds = len(self.pool_pages), len(model.attention_kinds)
        if num_pools not in (1, num_kinds):
            differing.append(f"{num_pools} pools (here {num_kinds} attention kinds)")
        if differing:
            raise PlanError(
                f"the steps were recorded with {self.model}, which has {', '.join(differing)}, not with {model_name}: "
                f"give the model that they were recorded with, or leave the model out to replay attention alone"
            )


class PlanFileWriter:
    """Records the steps of one engine; with token ids, what each step sampled too, once that is known."""

    def __init__(self, path: str | os.PathLike[str], *, token_ids: bool) -> None:
        """Open `path`, replacing a file that is there; `begin` comes next.

        Raises `ConfigError` where it cannot be written.
        """
        self._path = Path(path).expanduser()
        self._token_ids = token_ids
        self._encoder = PlanEncoder()
        self._packer = zlib.compressobj(COMPRESSION_LEVEL)
        try:
            self._file = open(self._path, "wb", buffering=0)  # noqa: SIM115, closed by close()
        except OSError as error:
            raise ConfigError(
                f"record_plans is {str(path)!r}, which cannot be written ({error.strerror}): give a file in a folder "
                "that exists"
            ) from error

    def begin(self, header: PlanFileHeader) -> None:
        """Write the header, once."""
        assert header.token_ids == self._token_ids
        self._write_frame(json.dumps(header.to_json()).encode(), MAGIC)

    def write_step(self, plan: StepPlan) -> None:
        """Record a step that is about to run."""
        if not self._file.closed:
            self._write_frame(self._encoder.encode(plan if self._token_ids else _without_token_ids(plan)))

    def write_result(self, result: StepResult) -> None:
        """Record what a step sampled, where token ids are wanted."""
        if self._token_ids and not self._file.closed:
            self._write_frame(encode_result(result))

    def close(self) -> None:
        """Complete the file; a second call does nothing."""
        if not self._file.closed:
            self._write_frame(b"")
            self._file.close()

    def _write_frame(self, message: bytes, before: bytes = b"") -> None:
        packed = self._packer.compress(message) + self._packer.flush(zlib.Z_SYNC_FLUSH if message else zlib.Z_FINISH)
        self._write(before + FRAME.pack(len(packed), len(message)) + packed)

    def _write(self, content: bytes) -> None:
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:  # a full disk must not end the requests that are served
            self._file.close()
            warnings.warn(
                f"{self._path}: recording of step plans ended ({error.strerror}), generation goes on",
                RuntimeWarning,
                stacklevel=4,
            )


def _without_token_ids(plan: StepPlan) -> StepPlan:
    """Zeros for every id, and none of the users' other words: stop strings, stop ids, biased ids, masks."""
    return replace(
        plan,
        token_ids=_zeros(len(plan.token_ids)),
        prompt_logprob_token_ids=_zeros(len(plan.prompt_logprob_token_ids)),
        sample_mask_rows=EMPTY,
        token_bitmasks=(),
        lane_starts=tuple(_start_without_token_ids(start) for start in plan.lane_starts),
    )


def _start_without_token_ids(start: LaneStart) -> LaneStart:
    return replace(
        start,
        params=replace(start.params, logit_bias=None, stop=None, stop_token_ids=None),
        prompt_token_ids=_zeros(len(start.prompt_token_ids)),
        output_token_ids=_zeros(len(start.output_token_ids)),
        ending_token_ids=frozenset(),
    )


def _zeros(length: int) -> memoryview:
    return int_column(array("i", bytes(4 * length)))


@dataclass(slots=True)
class RecordedStep:
    """A step as it was planned, and its result where that was recorded."""

    frame: int
    """Where it stands in the file; the header is frame 1."""
    plan: StepPlan
    result: StepResult | None = None

    @property
    def rejected_samples(self) -> set[int]:
        """Samples behind what was accepted of a draft; their tokens mean nothing."""
        plan, accepted = self.plan, self.result.accepted_counts if self.result else self.plan.draft_lens
        return {
            sample
            for first, length, count in zip(plan.draft_samples, plan.draft_lens, accepted, strict=True)
            for sample in range(first + count + 1, first + length + 1)
        }

    @property
    def token_ids(self) -> list[int | None] | None:
        """[samples], None where the token means nothing; None as a whole where the result is not in the file."""
        if self.result is None:
            return None
        without = self.result.failed_samples | self.rejected_samples
        return [None if i in without else token_id for i, token_id in enumerate(self.result.token_ids)]


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
        """The frame at which the file breaks off, once iteration has reached it."""
        self._allow_truncated = allow_truncated
        self._frame = 1
        self._waiting: deque[RecordedStep] = deque()
        self._decoder, self._unpacker = PlanDecoder(), zlib.decompressobj()
        try:
            self._file = open(self.path, "rb")  # noqa: SIM115, closed by close()
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise PlanError(f"{self.path} cannot be read ({error.strerror}): give a file of record_plans") from error
        try:
            self.header = self._read_header()
        except PlanError as error:
            self.close()
            raise self._wrong(str(error)) from error.__cause__
        self._limits = _PlanLimits(self.header)

    def __iter__(self) -> Iterator[RecordedStep]:
        """All steps in their order. Raises `PlanError` at the first frame that is wrong."""
        while True:
            self._frame += 1
            try:
                message = self._read_frame()
                if message is None:
                    break
                self._take(message)
            except PlanError as error:
                cure = "" if isinstance(error, _BreaksOff) else f": {RECORD_AGAIN}"
                raise self._wrong(f"{error}{cure}") from error.__cause__
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
        if not self._size:
            raise PlanError(f"the file is empty: {RECORD_ONE}")
        magic = self._file.read(len(MAGIC))
        if magic.startswith(GZIP_MAGIC):
            return PlanFileHeader.from_json(_first_json_line(self.path))  # always of an earlier version
        if magic != MAGIC:
            raise PlanError(f"this is no plan file: {RECORD_ONE}")
        message = self._read_frame()
        try:
            given = json.loads(message or b"")
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the header is not JSON ({error}): {RECORD_AGAIN}") from None
        return PlanFileHeader.from_json(given)

    def _read_frame(self) -> bytes | None:
        """The next message; None at the end, which may be early where that is allowed."""
        head = self._file.read(FRAME.size)
        packed_bytes, num_bytes = FRAME.unpack(head) if len(head) == FRAME.size else (self._size, 1)
        if num_bytes > MAX_FRAME_BYTES:
            raise PlanError(f"a frame of {num_bytes} bytes, the most are {MAX_FRAME_BYTES}")
        if packed_bytes > self._size - self._file.tell():
            self._break_off()
            return None
        try:
            message = self._unpacker.decompress(self._file.read(packed_bytes), num_bytes + 1)
        except zlib.error as error:
            raise PlanError(f"the frame cannot be decompressed ({error})") from None
        if len(message) != num_bytes or self._unpacker.eof != (num_bytes == 0):
            raise PlanError(f"the frame does not hold the {num_bytes} bytes that it names")
        if not num_bytes and self._file.read(1):
            raise PlanError("something follows the end of the recording")
        return message or None

    def _break_off(self) -> None:
        if not self._allow_truncated or self._frame == 1:
            cure = "allow a truncated file to use the steps before" if self._frame > 1 else "record it again"
            raise _BreaksOff(f"the file breaks off here, as after a crash: {cure}")
        self.truncated_at = self._frame

    def _take(self, message: bytes) -> None:
        if is_result(message):
            self._take_result(decode_result(message))
            return
        plan = self._decoder.decode(message)
        plan.check()
        self._limits.check(plan)
        self._waiting.append(RecordedStep(self._frame, plan))

    def _take_result(self, result: StepResult) -> None:
        step = next((step for step in self._waiting if step.plan.step_id == result.step_id), None)
        if step is None or step.result is not None:
            raise PlanError(f"a result of step {result.step_id}, which does not wait for one")
        result.check(step.plan)
        step.result = result
        self._limits.check_token_ids("the result", [t for t in step.token_ids or () if t is not None])

    def _settled(self, max_waiting: int) -> Iterator[RecordedStep]:
        """Steps that have their result, or will not get one."""
        while self._waiting and (len(self._waiting) > max_waiting or self._waiting[0].result is not None):
            yield self._waiting.popleft()

    def _wrong(self, what: str) -> PlanError:
        return PlanError(f"{self.path}, frame {self._frame}: {what}")


class _BreaksOff(PlanError):
    """The file ends in a frame."""


def _first_json_line(path: Path) -> object:
    """The header of a file of format 1, which was gzip-compressed JSON lines; None for any other gzip file."""
    try:
        with gzip.open(path, "rb") as file:
            return json.loads(file.readline(1 << 16))
    except (OSError, EOFError, ValueError, RecursionError, zlib.error):
        return None


class _PlanLimits:
    """What plans must keep to beside their invariants: the pool, the lanes and the vocabulary of their file's header.

    Checks the plans of one file in their order, and remembers which sequences have entered a lane.
    """

    def __init__(self, header: PlanFileHeader) -> None:
        self._header = header
        self._epochs: dict[int, int] = {}

    def check(self, plan: StepPlan) -> None:
        """Raise `PlanError` where a plan leaves the pool, the lanes, the context, the layers or the vocabulary."""
        header = self._header
        if 1 + len(plan.window_slots) != len(header.pool_pages):
            raise PlanError(f"it writes to {1 + len(plan.window_slots)} pools, there were {len(header.pool_pages)}")
        for kind, cascade in enumerate(plan.cascades):
            self._check_pages(cascade, kind if plan.window_slots else 0)
        for copy in plan.page_copies:
            for page, tier in ((copy.source, copy.source_tier), (copy.target, copy.target_tier)):
                if page < 0 or (tier is Tier.DEVICE and page >= header.pool_pages[copy.pool]):
                    raise PlanError(f"it copies page {copy.source} to {copy.target}, {self._pool(copy.pool)}")
        if any(position >= header.max_model_len for position in plan.positions):
            raise PlanError(f"a position is beyond max_model_len {header.max_model_len}")
        if plan.layer_kinds and len(plan.layer_kinds) != header.num_layers:
            raise PlanError(f"{len(plan.layer_kinds)} layer_kinds, the model has {header.num_layers} layers")
        if plan.token_bitmasks and len(plan.token_bitmasks[0]) != -(-header.vocab_size // 32):
            raise PlanError(f"token_bitmasks of {len(plan.token_bitmasks[0])} words, {self._vocabulary}")
        self._check_lanes(plan)
        self.check_token_ids("the step", plan.token_ids)
        self.check_token_ids("prompt_logprob_token_ids", plan.prompt_logprob_token_ids)
        if any(count < 0 for count in plan.prompt_logprob_counts):
            raise PlanError("prompt_logprob_counts has a negative count")

    def check_token_ids(self, what: str, token_ids: Iterable[int]) -> None:
        """Raise `PlanError` for one that is none of the vocabulary's."""
        wrong = next((token_id for token_id in token_ids if not 0 <= token_id < self._header.vocab_size), None)
        if wrong is not None:
            raise PlanError(f"{what} has the token id {wrong!r}, {self._vocabulary}")

    def _pool(self, number: int) -> str:
        return f"the pool has {self._header.pool_pages[number]} pages"

    @property
    def _vocabulary(self) -> str:
        return f"the vocabulary has {self._header.vocab_size}"

    def _check_pages(self, cascade: CascadePlan, pool: int) -> None:
        if cascade.page_size != self._header.page_size:
            raise PlanError(f"its page_size is {cascade.page_size}, the header's {self._header.page_size}")
        for depth, level in enumerate(cascade.levels):
            largest = max(level.kv_page_indices, default=0)
            if largest >= self._header.pool_pages[pool]:
                raise PlanError(f"level {depth} reads page {largest}, {self._pool(pool)}")

    def _check_lanes(self, plan: StepPlan) -> None:
        for start in plan.lane_starts:
            if not 0 <= start.lane < self._header.max_num_seqs:
                raise PlanError(f"a sequence enters lane {start.lane}, there are {self._header.max_num_seqs}")
            if not start.prompt_token_ids:
                raise PlanError(f"the sequence that enters lane {start.lane} has no prompt")
            for what in ("prompt_token_ids", "output_token_ids", "params.logit_bias"):
                ids = start.params.logit_bias or () if what == "params.logit_bias" else getattr(start, what)
                self.check_token_ids(f"lane {start.lane}, {what}", ids)
            self._epochs[start.lane] = start.epoch
        for lane in plan.sample_lanes:
            if lane not in self._epochs:
                raise PlanError(f"it samples in lane {lane}, which no sequence has entered")
        for lane, epoch in zip(plan.sequence_lanes, plan.sequence_epochs, strict=True):
            if self._epochs.get(lane) != epoch:
                raise PlanError(f"a sequence is in use {epoch} of lane {lane}, the last to enter began another")
