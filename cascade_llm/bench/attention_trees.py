"""Attention alone: decode steps over trees of shared prefixes, the planner's plan against one level.

The trees are the public yardstick of PAT (ASPLOS 2026): nodes per level over tokens per node. A decode step of as many
sequences as the last level has nodes is planned by the real scheduler and cost model, and timed on the attention
backend that this machine uses. `prepare` is told apart, since it is made once for all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.select import select_backend
from cascade_llm.bench.attention_cases import PAGE_SIZE, AttentionCase
from cascade_llm.bench.attention_timing import check_memory, time_plans
from cascade_llm.bench.machine_limits import MachineLimits
from cascade_llm.bench.plan_tree import decode_step
from cascade_llm.bench.step_work import ModelShape, floor_s, step_work
from cascade_llm.config import CascadeConfig
from cascade_llm.device.devices import thread_limit
from cascade_llm.engine.cost_setup import choose_cost_model
from cascade_llm.errors import ConfigError
from cascade_llm.scheduler.cascade.cost_model import AttentionShape

__all__ = ["PUBLIC_TREES", "HeadLayout", "TreeResult", "measure_tree", "parse_trees"]

PUBLIC_TREES = (
    "1,10/4096,416",
    "1,256/256,32",
    "1,1024/2048,32",
    "1,2,64/1024,256,256",
    "1,4,256/32,256,32",
    "1,8,512/32,512,256",
    "1,8,512/32,2048,256",
    "1,8,512/512,512,256",
    "1,4,8,256/32,256,256,32",
    "1,4,16,512/1024,256,128,32",
    "1,4,16,64,256,1024/256,32,256,64,32,256",
    "2,8,16,256/256,256,32,32",
    "4,16,256,512/512,32,128,32",
    "8,16,32,256/512,512,256,32",
    "256/1024",
    "256/4096",
)
"""The last two share nothing: there a plan must not lose."""

MAX_LAYERS = 64
"""Attended one after the other, as far as the pool has so many."""


@dataclass(frozen=True)
class HeadLayout:
    """Query and KV heads."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int = 128

    @classmethod
    def parse(cls, text: str, head_dim: int = 128) -> HeadLayout:
        """Of "32/8"."""
        try:
            qo, kv = map(int, text.split("/"))
        except ValueError:
            raise ConfigError(f"{text!r} is no head layout: write query heads / KV heads, such as 32/8") from None
        if min(qo, kv, head_dim) < 1 or qo % kv:
            raise ConfigError(f"{text!r}: query heads must be a multiple of KV heads, both 1 or larger")
        return cls(qo, kv, head_dim)

    def __str__(self) -> str:
        return f"{self.num_qo_heads}/{self.num_kv_heads}"


@dataclass(frozen=True)
class TreeResult:
    """One tree on one layout; times of one layer in seconds, the shortest of several."""

    tree: str
    heads: str
    num_levels: int
    """Of the plan that the cost model chose, the leaf counted."""
    num_groups: int
    cascade_s: float
    one_level_s: float
    prepare_s: float
    """Of the chosen plan, once for all layers."""
    planning_s: float
    """The scheduler's step in which the plan was made."""
    floor_s: float
    costs: str
    """Where the constants of the cost model come from."""

    @property
    def speedup(self) -> float:
        """Over one level."""
        return self.one_level_s / self.cascade_s

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "speedup": self.speedup, "share_of_limit": self.floor_s / self.cascade_s}


def measure_tree(
    tree: AttentionCase,
    heads: HeadLayout,
    limits: MachineLimits,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    num_threads: int | None = None,
    measure_s: float = 0.5,
) -> TreeResult:
    """Time a layer of a tree's decode step, the planner's plan and one level in turns.

    Raises:
        ConfigError: its K/V do not fit the free memory
        BackendError: the backend cannot serve
    """
    spec = AttentionSpec(
        num_layers=MAX_LAYERS,
        num_qo_heads=heads.num_qo_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        sm_scale=heads.head_dim**-0.5,
        dtype=dtype,
        device=device,
    )
    check_memory(tree, spec)
    choice = select_backend(backend, spec)
    costs, source = choose_cost_model(spec, choice.name, num_threads=num_threads)
    prompts = list(tree.prompts())
    decode_of = partial(decode_step, prompts, costs, page_size=PAGE_SIZE, max_model_len=sum(tree.tokens) + 2)
    _, chosen, planning_s = decode_of(CascadeConfig())
    single = decode_of(CascadeConfig(enabled=False)).plan
    plans = {"chosen": chosen.cascade, "single": single.cascade}
    with thread_limit(num_threads):
        times = time_plans(tree, plans, spec, choice.backend, measure_s=2 * measure_s)
    work = step_work(chosen, _layer_shape(costs.shape))
    return TreeResult(
        tree=str(tree),
        heads=str(heads),
        num_levels=chosen.report.num_levels,
        num_groups=chosen.report.num_groups,
        cascade_s=times["chosen"].attend_s,
        one_level_s=times["single"].attend_s,
        prepare_s=times["chosen"].prepare_s,
        planning_s=planning_s,
        floor_s=floor_s([work], bytes_per_s=limits.bytes_per_s, flops_per_s=limits.flops_per_s),
        costs=source,
    )


def _layer_shape(shape: AttentionShape) -> ModelShape:
    """Attention of one layer and nothing else."""
    return ModelShape(
        weight_bytes=0,
        head_bytes=0,
        layer_flops_per_row=0,
        head_flops_per_row=0,
        kv_bytes_per_token=shape.kv_bytes_per_token,
        attention_flops_per_row_token=shape.flops_per_row_token,
    )


def parse_trees(texts: Sequence[str]) -> list[AttentionCase]:
    """The public trees where none is given."""
    return [AttentionCase.parse(text) for text in texts or PUBLIC_TREES]
