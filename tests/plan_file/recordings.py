"""Plan files to test with: written by hand from generated plans, read as text, and edited."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.plan_file.header import PlanFileHeader
from cascade_llm.plan_file.reader import PlanFileReader, RecordedStep
from cascade_llm.plan_file.writer import PlanFileWriter

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
    "total_pages": 400,
    "max_model_len": 128,
    "max_num_seqs": 16,
    "token_ids": True,
}


def header(**changes: Any) -> PlanFileHeader:
    return PlanFileHeader(**{**HEADER, **changes})


def write(path: Path, plans: Iterable[StepPlan], **changes: Any) -> Path:
    """A file of these plans; what a step sampled is the number of the sample."""
    first_line = header(**changes)
    writer = PlanFileWriter(path, token_ids=first_line.token_ids)
    writer.begin(first_line)
    for plan in plans:
        writer.write_step(plan)
        writer.write_result(StepResult(step_id=plan.step_id, token_ids=list(range(len(plan.sample_rows)))))
    writer.close()
    return path


def read(path: Path, *, allow_truncated: bool = False) -> list[RecordedStep]:
    with PlanFileReader(path, allow_truncated=allow_truncated) as reader:
        return list(reader)


def edit(path: Path, line: int, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Rewrite one line, numbered from 1, by changing its object in place; returns the path."""
    lines = gzip.decompress(path.read_bytes()).splitlines()
    value = json.loads(lines[line - 1])
    change(value)
    lines[line - 1] = json.dumps(value).encode()
    path.write_bytes(gzip.compress(b"".join(text + b"\n" for text in lines)))
    return path
