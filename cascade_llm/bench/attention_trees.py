"""Attention alone: decode steps over trees of shared prefixes, the planner's plan against one level.

The trees are the public yardstick of PAT (ASPLOS 2026): nodes per level over tokens per node. A decode step of as many
sequences as the last level has nodes is planned by the real scheduler and cost model, and layers are timed on the
attention backend that this machine uses: so many layers one after the other that none finds its K/V in a cache.
`prepare` is told apart, since it is made once for all layers.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec, PreparedAttention
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend, GpuPlatform
from cascade_llm.attention.select import BackendChoice, select_backend
from cascade_llm.bench.machine_limits import MachineLimits
from cascade_llm.bench.step_work import ModelShape, floor_s, step_work
from cascade_llm.config import CascadeConfig, SchedulerConfig
from cascade_llm.device.devices import thread_limit
from cascade_llm.engine.cost_setup import choose_cost_model
from cascade_llm.errors import ConfigError
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import CascadePlan, StepPlan, StepResult
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel
from cascade_llm.scheduler.scheduler import FlashInferScheduler
from cascade_llm.scheduler.sequence import Request
from cascade_llm.worker.memory import available_bytes

__all__ = ["PUBLIC_TREES", "HeadLayout", "PrefixTreeShape", "TreeResult", "measure_tree", "parse_trees", "tree_plan"]

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

PAGE_SIZE = 16
MEMORY_SHARE = 0.25
UNCACHED_BYTES = 256 << 20
"""K/V of all layers together: beyond any cache."""
MAX_LAYERS = 64


@dataclass(frozen=True)
class PrefixTreeShape:
    """Nodes per level, from the roots to the sequences, and tokens per node."""

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> PrefixTreeShape:
        """Of "1,4,256/32,256,32": 1 root of 32 tokens, 4 nodes of 256, 256 sequences of 32 more."""
        cure = "write nodes per level, a slash and tokens per node, such as 1,4,256/32,256,32"
        try:
            nodes, tokens = (tuple(map(int, part.split(","))) for part in text.split("/"))
        except ValueError:
            raise ConfigError(f"{text!r} is no tree: {cure}") from None
        if len(nodes) != len(tokens) or min(*nodes, *tokens) < 1:
            raise ConfigError(f"{text!r} is no tree: give as many levels on both sides, numbers from 1; {cure}")
        if any(below % above for above, below in itertools.pairwise(nodes)):
            raise ConfigError(f"{text!r}: each level's nodes must be a multiple of those above")
        return cls(nodes, tokens)

    def __str__(self) -> str:
        return f"{','.join(map(str, self.nodes))}/{','.join(map(str, self.tokens))}"

    @property
    def num_tokens(self) -> int:
        """Of all nodes."""
        return sum(count * length for count, length in zip(self.nodes, self.tokens, strict=True))

    def prompts(self) -> Iterator[list[int]]:
        """Token ids of each sequence; nodes differ in every page."""
        for sequence in range(self.nodes[-1]):
            ids: list[int] = []
            for depth, (count, length) in enumerate(zip(self.nodes, self.tokens, strict=True)):
                node = sequence * count // self.nodes[-1]
                ids += [1 + (depth << 24 | node)] * length
            yield ids


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
    """One tree on one layout; times of one layer in seconds, medians."""

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
    tree: PrefixTreeShape,
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
        ConfigError: its K/V do not fit a quarter of the free memory
        BackendError: the backend cannot serve
    """
    num_bytes = 2 * tree.num_tokens * heads.num_kv_heads * heads.head_dim * dtype.itemsize
    if num_bytes > available_bytes(device) * MEMORY_SHARE:
        raise ConfigError(
            f"the tree {tree} has {num_bytes / 1e9:.1f} GB of K/V with {heads} heads, more than a quarter of the free "
            "memory: leave it out, or choose fewer heads"
        )
    spec = AttentionSpec(
        num_layers=max(1, min(MAX_LAYERS, UNCACHED_BYTES // num_bytes)),
        num_qo_heads=heads.num_qo_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.head_dim,
        sm_scale=heads.head_dim**-0.5,
        dtype=dtype,
        device=device,
    )
    choice = select_backend(backend, spec)
    costs, source = choose_cost_model(spec, choice.name, num_threads=num_threads)
    chosen, planning_s = tree_plan(tree, costs, CascadeConfig())
    single, _ = tree_plan(tree, costs, CascadeConfig(enabled=False))
    with torch.inference_mode(), thread_limit(num_threads):
        engine = _backend(choice, spec, max(_last_page(chosen), _last_page(single)) + 1)
        q = torch.randn(chosen.num_rows, heads.num_qo_heads, heads.head_dim, device=device).to(dtype)
        cascade_s, one_level_s, prepare_s = _times(engine, q, chosen.cascade, single.cascade, measure_s)
    work = step_work(chosen, _layer_shape(costs.shape))
    return TreeResult(
        tree=str(tree),
        heads=str(heads),
        num_levels=chosen.report.num_levels,
        num_groups=chosen.report.num_groups,
        cascade_s=cascade_s,
        one_level_s=one_level_s,
        prepare_s=prepare_s,
        planning_s=planning_s,
        floor_s=floor_s([work], bytes_per_s=limits.bytes_per_s, flops_per_s=limits.flops_per_s),
        costs=source,
    )


def tree_plan(tree: PrefixTreeShape, costs: CostModel, cascade: CascadeConfig) -> tuple[StepPlan, float]:
    """The plan of a decode step over all of a tree's sequences, and the seconds that the scheduler took for it."""
    prompts = list(tree.prompts())
    longest = max(map(len, prompts)) + 2
    config = SchedulerConfig(
        page_size=PAGE_SIZE,
        total_pages=sum(
            count * (-(-length // PAGE_SIZE) + 2) for count, length in zip(tree.nodes, tree.tokens, strict=True)
        )
        + len(prompts) * 4,
        max_model_len=longest,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=sum(map(len, prompts)),
        cascade=cascade,
    )
    scheduler = FlashInferScheduler(config, costs)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    for index, token_ids in enumerate(prompts):
        scheduler.add(Request(request_id=str(index), prompt_token_ids=token_ids, params=params, seed=0))
    prefill = scheduler.schedule()
    assert prefill is not None
    tokens = [0] * len(prefill.sample_rows)
    scheduler.commit(prefill, StepResult(step_id=prefill.step_id, token_ids=tokens))
    start_s = time.perf_counter()
    decode = scheduler.schedule()
    planning_s = time.perf_counter() - start_s
    assert decode is not None
    assert decode.num_rows == len(prompts)
    return decode, planning_s


def _backend(choice: BackendChoice, spec: AttentionSpec, num_pages: int) -> AttentionBackend:
    kv_cache = PagedKVCache(
        num_layers=spec.num_layers,
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        device=spec.device,
        layout=choice.backend.preferred_layout(spec.device),
    )
    for layer in range(spec.num_layers):
        kv_cache.layer(layer).normal_()
    if choice.name == "flashinfer":
        return FlashInferAttentionBackend(spec, kv_cache, GpuPlatform.cuda(spec.device))
    return choice.backend(spec, kv_cache)


def _times(
    backend: AttentionBackend, q: torch.Tensor, chosen: CascadePlan, single: CascadePlan, measure_s: float
) -> tuple[float, float, float]:
    """Medians of a layer's `attend` for both plans, in turns, and of `prepare` for the chosen one."""
    times: dict[str, list[float]] = {"chosen": [], "single": [], "prepare": []}
    num_layers = backend.spec.num_layers
    end_s, num_turns = time.perf_counter() + 2 * measure_s, 0
    while num_turns < 4 or time.perf_counter() < end_s:
        for name, plan in (("chosen", chosen), ("single", single))[:: 1 if num_turns % 2 else -1]:
            prepare_s, prepared = _timed(lambda plan=plan: backend.prepare(plan), q.device)  # type: ignore[misc]
            attend_s, _ = _timed(lambda prepared=prepared: _attend_all(prepared, num_layers, q), q.device)  # type: ignore[misc]
            if num_turns:  # the first turn warms up
                times[name].append(attend_s / num_layers)
                if name == "chosen":
                    times["prepare"].append(prepare_s)
        num_turns += 1
    return tuple(statistics.median(of_name) for of_name in times.values())  # type: ignore[return-value]


def _attend_all(prepared: PreparedAttention, num_layers: int, q: torch.Tensor) -> None:
    for layer in range(num_layers):
        prepared.attend(layer, q)


def _timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s, result


def _last_page(plan: StepPlan) -> int:
    return max(max(level.kv_page_indices, default=0) for level in plan.cascade.levels)


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


def parse_trees(texts: Sequence[str]) -> list[PrefixTreeShape]:
    """The public trees where none is given."""
    return [PrefixTreeShape.parse(text) for text in texts or PUBLIC_TREES]
