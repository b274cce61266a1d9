"""What a step needs at least: bytes that must be read or written, flops that must be made, and the time of both.

A roofline (Williams, Waterman, Patterson 2009): weights are read once, each page of K/V once for all that share it,
products are counted as 2 flops per multiply and add. A step cannot be faster than the larger of bytes over the
machine's bandwidth and flops over its matrix rates: products with quantized weights are made of integers, attention is
not. Norms, activations, softmax and sampling count as nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from cascade_llm.config import ModelConfig
from cascade_llm.plan import CascadePlan, StepPlan

__all__ = ["ModelShape", "Work", "floor_s", "step_work", "total_work"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What a step's work depends on."""

    weight_bytes: int
    """Of all linear layers but the head."""
    head_bytes: int
    layer_flops_per_row: int
    """Of all linear layers but the head."""
    head_flops_per_row: int
    kv_bytes_per_token: int
    """K and V over all layers."""
    attention_flops_per_row_token: int
    """Both products of one row with one token, over all layers."""

    @classmethod
    def of(
        cls, model: ModelConfig, *, layer_weight_bytes: float, head_weight_bytes: float, kv_dtype_bytes: float
    ) -> ModelShape:
        """Of a dense decoder; bytes are per weight, a fraction where weights are quantized."""
        q_size, kv_size = model.num_qo_heads * model.head_dim, model.num_kv_heads * model.head_dim
        per_layer = model.hidden_size * (2 * q_size + 2 * kv_size + 3 * model.intermediate_size)
        head = model.hidden_size * model.vocab_size
        return cls(
            weight_bytes=int(model.num_layers * per_layer * layer_weight_bytes),
            head_bytes=int(head * head_weight_bytes),
            layer_flops_per_row=2 * model.num_layers * per_layer,
            head_flops_per_row=2 * head,
            kv_bytes_per_token=model.kv_bytes_per_token(kv_dtype_bytes),
            attention_flops_per_row_token=4 * model.num_layers * q_size,
        )


class Work(NamedTuple):
    """Of one or more steps."""

    num_steps: int
    weight_bytes: int
    kv_bytes: int
    """K and V read and written."""
    linear_flops: int
    attention_flops: int

    @property
    def num_bytes(self) -> int:
        """All bytes."""
        return self.weight_bytes + self.kv_bytes

    @property
    def flops(self) -> int:
        """All flops."""
        return self.linear_flops + self.attention_flops


def step_work(plan: StepPlan, shape: ModelShape) -> Work:
    """The least work of one step.

    K/V of pages that rows of this very step fill need not be read again: they are counted as written only.
    """
    cascade, num_samples = plan.cascade, len(set(plan.sample_rows))
    tokens_read = max(0, _distinct_tokens(cascade) - plan.num_rows)
    return Work(
        num_steps=1,
        weight_bytes=shape.weight_bytes + (shape.head_bytes if num_samples else 0),
        kv_bytes=(tokens_read + plan.num_rows) * shape.kv_bytes_per_token,
        linear_flops=plan.num_rows * shape.layer_flops_per_row + num_samples * shape.head_flops_per_row,
        attention_flops=sum(position + 1 for position in plan.positions) * shape.attention_flops_per_row_token,
    )


def total_work(works: Iterable[Work]) -> Work:
    """The sum."""
    return Work(*map(sum, zip((0,) * len(Work._fields), *works, strict=True)))


def floor_s(
    works: Iterable[Work], *, bytes_per_s: float, flops_per_s: float, linear_flops_per_s: float | None = None
) -> float:
    """The least time of steps that run one after the other.

    Args:
        works: of the steps
        bytes_per_s: from and to memory
        flops_per_s: of attention
        linear_flops_per_s: of products with weights; default as of attention
    """
    linear_rate = linear_flops_per_s or flops_per_s
    return sum(
        max(work.num_bytes / bytes_per_s, work.linear_flops / linear_rate + work.attention_flops / flops_per_s)
        for work in works
    )


def _distinct_tokens(cascade: CascadePlan) -> int:
    """Tokens of all pages that a plan names, each page once."""
    lens: dict[int, int] = {}
    size = cascade.page_size
    for level in cascade.levels:
        for (begin, end), last_len in zip(pairwise(level.kv_page_indptr), level.kv_last_page_len, strict=True):
            if begin == end:
                continue
            pages = level.kv_page_indices[begin:end].tolist()
            lens.update(dict.fromkeys(pages[:-1], size))
            lens[pages[-1]] = max(last_len, lens.get(pages[-1], 0))
    return sum(lens.values())
