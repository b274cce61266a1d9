"""Plan files to test with: written by hand from generated plans, taken apart, and edited."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.plan_codec import PlanDecoder, PlanEncoder, decode_result, encode_result, is_result
from cascade_llm.plan_file import FRAME, MAGIC, PlanFileHeader, PlanFileReader, PlanFileWriter, RecordedStep

HEADER: dict[str, Any] = {
    "cascade_llm": "0.1.0",
    "model": "tiny",
    "num_layers": 2,
    "num_qo_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "vocab_size": 1000,
    "sm_scale": 0.25,
    "dtype": "float32",
    "page_size": 4,
    "pool_pages": [400],
    "max_model_len": 128,
    "max_num_seqs": 16,
    "token_ids": True,
    "kv_cache_dtype": "auto",
    "attention_soft_cap": None,
}


def header(**changes: Any) -> PlanFileHeader:
    return PlanFileHeader(**{**HEADER, **changes})


def result_of(plan: StepPlan) -> StepResult:
    """A result in which every sample is its own number."""
    return StepResult(
        step_id=plan.step_id,
        token_ids=list(range(len(plan.sample_rows))),
        accepted_counts=[0] * len(plan.draft_lens),
        logprobs=[],
        prompt_logprobs=[TokenLogprob(token_id, -1.0, 1, ()) for token_id in plan.prompt_logprob_token_ids],
    )


def write(path: Path, plans: Iterable[StepPlan], **changes: Any) -> Path:
    """A file of these plans and of `result_of` each."""
    first = header(**changes)
    writer = PlanFileWriter(path, token_ids=first.token_ids)
    writer.begin(first)
    for plan in plans:
        writer.write_step(plan)
        writer.write_result(result_of(plan))
    writer.close()
    return path


def read(path: Path, *, allow_truncated: bool = False) -> list[RecordedStep]:
    with PlanFileReader(path, allow_truncated=allow_truncated) as reader:
        return list(reader)


def messages(path: Path) -> list[bytes]:
    """What the frames of a whole file hold."""
    content, found, unpacker = path.read_bytes().removeprefix(MAGIC), list[bytes](), zlib.decompressobj()
    while content:
        packed_bytes, _ = FRAME.unpack_from(content)
        found.append(unpacker.decompress(content[FRAME.size : FRAME.size + packed_bytes]))
        content = content[FRAME.size + packed_bytes :]
    return found[:-1]


def frames(*found: bytes, end: bool = True) -> bytes:
    """A file of these messages."""
    packer, content = zlib.compressobj(), MAGIC
    for message in (*found, b"") if end else found:
        packed = packer.compress(message) + packer.flush(zlib.Z_SYNC_FLUSH if message else zlib.Z_FINISH)
        content += FRAME.pack(len(packed), len(message)) + packed
    return content


def edit(path: Path, frame: int, change: Callable[[Any], Any]) -> Path:
    """Rewrite one frame, numbered from 1: the header's object is changed in place, of a plan or a result a changed
    one is returned. Returns the path."""
    first, *others = messages(path)
    given = json.loads(first)
    decoder, encoder = PlanDecoder(), PlanEncoder()
    items = [decode_result(message) if is_result(message) else decoder.decode(message) for message in others]
    if frame == 1:
        change(given)
    else:
        items[frame - 2] = change(items[frame - 2])
    encoded = [encode_result(item) if isinstance(item, StepResult) else encoder.encode(item) for item in items]
    path.write_bytes(frames(json.dumps(given).encode(), *encoded))
    return path
