"""The first line of a plan file: what must be known to run its steps elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from cascade_llm.config import ModelConfig
from cascade_llm.errors import PlanError

__all__ = ["FORMAT_VERSION", "PlanFileHeader"]

FORMAT = "cascade-llm step plans"
FORMAT_VERSION = 1
"""Grows when an older reader would misread a file."""

DTYPES = ("float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "fp8_e4m3")
INTEGERS = (
    "num_layers",
    "num_qo_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "page_size",
    "total_pages",
    "max_model_len",
    "max_num_seqs",
)
"""Fields that must be integers, 1 or larger."""
MODEL_FIELDS = ("num_layers", "num_qo_heads", "num_kv_heads", "head_dim", "vocab_size")
"""Fields that belong to the model and are called the same in its configuration."""


@dataclass(frozen=True, kw_only=True)
class PlanFileHeader:
    """Model, pool and limits of the engine whose steps were recorded."""

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
    total_pages: int
    max_model_len: int
    max_num_seqs: int
    """Lanes."""
    token_ids: bool
    """Whether token ids were recorded, those that were sampled and the users' stop strings with them."""
    kv_cache_dtype: str = "auto"
    """Of the KV pool: auto (as `dtype`) | fp8_e4m3."""

    def to_json(self) -> dict[str, Any]:
        """The line's object."""
        return {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, line: object) -> PlanFileHeader:
        """Read the line's object; `PlanError` for another format, another version, or fields that make no sense."""
        if not isinstance(line, Mapping) or line.get("format") != FORMAT:
            raise PlanError('this is no plan file: record one with LLM(..., record_plans="plans.jsonl.gz")')
        writer = line.get("cascade_llm", "unknown")
        if line.get("version") != FORMAT_VERSION:
            raise PlanError(
                f"format {line.get('version')!r} was written by cascade-llm {writer}, this one reads format "
                f"{FORMAT_VERSION}: replay it with cascade-llm {writer}, or record it again with this one"
            )
        names = [field.name for field in fields(cls) if field.name in line]
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in line]
        if missing:
            raise PlanError(f"the header lacks {', '.join(missing)}: record the file again")
        header = cls(**{name: line[name] for name in names})
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
        if self.dtype not in DTYPES:
            raise PlanError(f"the header's dtype is {self.dtype!r}, it must be one of {', '.join(DTYPES)}")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            known = ", ".join(KV_CACHE_DTYPES)
            raise PlanError(f"the header's kv_cache_dtype is {self.kv_cache_dtype!r}, it must be one of {known}")
        if not isinstance(self.sm_scale, float) or not 0 < self.sm_scale < float("inf"):
            raise PlanError(f"the header's sm_scale is {self.sm_scale!r}, it must be a positive number")
        if not isinstance(self.token_ids, bool):
            raise PlanError(f"the header's token_ids is {self.token_ids!r}, it must be true or false")

    def check_model(self, name: str, model: ModelConfig) -> None:
        """Raise `PlanError` unless a model has the recorded one's shape."""
        differing = [
            f"{field} {getattr(self, field)} (here {getattr(model, field)})"
            for field in MODEL_FIELDS
            if getattr(self, field) != getattr(model, field)
        ]
        if differing:
            raise PlanError(
                f"the steps were recorded with {self.model}, which has {', '.join(differing)}, not with {name}: "
                f"give the model that they were recorded with, or leave the model out to replay attention alone"
            )
