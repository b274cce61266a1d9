"""Attention alone: right by every kernel choice, and how fast next to FlashInfer's own ways and the memory's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch

from cascade_llm.attention.backend import AttentionSpec, column_tensor
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend, GpuPlatform
from cascade_llm.attention.flashinfer.graph import GraphAttention, SharedColumns
from cascade_llm.attention.flashinfer.levels import DecodeKernel, LevelBuffers, LevelColumns, decode_kernel
from cascade_llm.attention.reference import reference_attention
from cascade_llm.kv_cache.paged_kv_cache import KVScale, PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan
from cascade_llm.tiling import max_tiles
from cascade_llm.worker.graph_shapes import GraphShape, fitting_shape, graph_shapes
from scripts.gpu_suite.machine import Machine
from scripts.gpu_suite.shapes import PAGE_SIZE, Sizes, Tree

__all__ = ["measure_attention", "measure_plans", "validate_kernels"]

VALIDATED_ROWS = 64
"""The float64 reference gathers every row's K/V."""
MAX_SHARED = 3
FP8, SCALE = torch.float8_e4m3fn, KVScale(0.5, 0.75)
"""Pages of 8 bits, and scales that show when one is left out."""

DECODE_LEAVES: tuple[DecodeKernel, ...] = ("decode_tensor_cores", "decode_cuda_cores")
"""What can serve the leaf below fa2's shared levels."""


class Way(NamedTuple):
    """A way to compute attention, to be timed."""

    name: str
    make: Callable[[], Callable[[], object]]
    captured: bool = True
    """Whether the stopwatch runs it from a graph."""


class Setting:
    """One tree on one head layout: a pool with random K/V, and random queries."""

    def __init__(
        self,
        machine: Machine,
        tree: Tree,
        heads: tuple[int, int],
        head_dim: int,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`kv_dtype`: of the pages, where it is not the machine's; of 8 bits they have scales."""
        num_qo_heads, num_kv_heads = heads
        self.tree = tree
        self.spec = AttentionSpec(
            num_layers=1,
            num_qo_heads=num_qo_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            sm_scale=head_dim**-0.5,
            dtype=machine.dtype,
            device=machine.device,
            kv_dtype=kv_dtype,
        )
        self.pool = PagedKVCache(
            num_layers=1,
            num_pages=tree.num_pages + 1,
            page_size=PAGE_SIZE,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=self.spec.page_dtype,
            device=machine.device,
            scales=[SCALE] if kv_dtype is not None else None,
        )
        pages = self.pool.layer(0)
        if kv_dtype is None:
            pages.normal_()
        else:  # torch draws no 8-bit floats
            pages.copy_(torch.randn(pages.shape, device=machine.device))
        self.q = torch.randn(tree.rows, num_qo_heads, head_dim, device=machine.device).to(machine.dtype)

    def eager(
        self, platform: GpuPlatform, plan: CascadePlan, leaf: DecodeKernel
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        """Attention planned as eager steps do."""
        prepared = FlashInferAttentionBackend(self.spec, self.pool, platform, leaf).prepare(plan)
        return lambda: prepared.attend(0, self.q)

    def captured(
        self, platform: GpuPlatform, plan: CascadePlan, leaf: DecodeKernel
    ) -> Callable[[], tuple[torch.Tensor, torch.Tensor]] | None:
        """Attention as graphs do it: fixed capacities, tiles chosen by them. None where no graph has that shape."""
        shapes = graph_shapes(self.tree.rows, self.spec.group_size, len(plan.shared_levels))
        most_tiles = max_tiles(platform.num_processors, self.spec.num_kv_heads)
        shape = fitting_shape(plan, [s for s in shapes if s.rows == self.tree.rows], self.spec.group_size, most_tiles)
        if shape is None:
            return None
        backend = FlashInferAttentionBackend(self.spec, self.pool, platform, leaf, [shape])
        attention = _graph_attention(backend, plan, shape)
        return lambda: attention.attend(0, self.q)


def _graph_attention(backend: FlashInferAttentionBackend, plan: CascadePlan, shape: GraphShape) -> GraphAttention:
    stream, device = backend.device.stream, backend.spec.device
    leaf = _padded(plan.leaf, shape.rows)
    buffers = LevelBuffers(*(column.to(device) for column in leaf))
    shared = [SharedColumns(capacity, backend.kv_cache.num_pages, device) for capacity in shape.capacities]
    attention = GraphAttention(backend, shape.rows, shape.capacities, buffers, shared, backend.platform.num_processors)
    pinned = [_pinned(stream, column) for column in leaf]
    attention.plan_leaf(LevelColumns(*pinned), None)
    for position, (level, capacity) in enumerate(zip(plan.shared_levels, shape.capacities, strict=True)):
        columns = LevelColumns(*(_pinned(stream, column) for column in _padded(level, capacity)))
        attention.plan_shared(position, level, columns)
    stream.record_event().synchronize()
    return attention


def _padded(level: CascadeLevel, capacity: int) -> tuple[torch.Tensor, ...]:
    spare = capacity - level.num_segments
    qo_indptr, page_indptr = column_tensor(level.qo_indptr), column_tensor(level.kv_page_indptr)
    last = column_tensor(level.kv_last_page_len)
    return (
        torch.cat((qo_indptr, qo_indptr[-1:].expand(spare))),
        torch.cat((page_indptr, page_indptr[-1:].expand(spare))),
        column_tensor(level.kv_page_indices),
        torch.cat((last, last.new_zeros(spare))),
    )


def _pinned(stream: Any, column: torch.Tensor) -> torch.Tensor:
    buffer: torch.Tensor = stream.pinned(max(1, len(column)), torch.int32)[: len(column)]
    return buffer.copy_(column)


def validate_kernels(
    machine: Machine, sizes: Sizes, has_time: Callable[[], bool], *, fp8: bool = False
) -> list[dict[str, Any]]:
    """The largest error of each kernel choice against float64, on the trees that the reference can hold.

    fp8: also over pages of 8 bits, against the reference over the decoded pages
    """
    results: list[dict[str, Any]] = []
    trees = [tree for tree in sizes.trees if tree.rows <= VALIDATED_ROWS] or [sizes.trees[0]]
    for kv_dtype, tree, heads in product((None, FP8) if fp8 else (None,), trees, sizes.heads):
        if not has_time():
            results.append({"skipped": f"{tree} {heads}, {kv_dtype}: out of time"})
            continue
        setting = Setting(machine, tree, heads, sizes.head_dim, kv_dtype)
        plan = tree.plan(MAX_SHARED)
        expected, expected_lse = reference_attention(plan, setting.pool, 0, setting.q, setting.spec.sm_scale)
        for leaf in DECODE_LEAVES:
            entry: dict[str, Any] = {"tree": str(tree), "heads": list(heads), "kernels": leaf}
            entry["pages"] = str(setting.spec.page_dtype).removeprefix("torch.")
            for mode, prepared in (("eager", setting.eager), ("graph", setting.captured)):
                found = {**entry, "mode": mode}
                try:
                    work = prepared(machine.platform(), plan, leaf)
                    if work is None:
                        continue  # no graph has the plan's shape
                    out, lse = work()
                    machine.synchronize()
                    found["max_error"] = float((out.double() - expected).abs().max())
                    found["max_lse_error"] = float((lse.double() - expected_lse).abs().max())
                except Exception as error:  # a kernel that cannot serve is a result too
                    found["refused"] = f"{type(error).__name__}: {error}"[:300]
                results.append(found)
    return results


def measure_attention(
    machine: Machine, sizes: Sizes, bytes_per_s: float, flops_per_s: float, has_time: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Microseconds of one layer: plain decode, FlashInfer's cascade wrapper, ours by kernel choice, the roofline."""
    results = []
    for heads, tree in product(sizes.heads, sizes.trees):
        if not has_time():
            results.append({"skipped": f"{tree} {heads}: out of time"})
            continue
        setting = Setting(machine, tree, heads, sizes.head_dim)
        floor = _floor_s(tree, setting.spec, bytes_per_s, flops_per_s)
        entry: dict[str, Any] = {"tree": str(tree), "heads": list(heads), "floor_us": 1e6 * floor}
        for way in _ways(machine, setting):
            try:
                entry[f"{way.name}_us"] = 1e6 * machine.seconds(way.make(), captured=way.captured)
            except Exception as error:
                entry[f"{way.name}_error"] = f"{type(error).__name__}: {error}"[:200]
        results.append(entry)
    return results


def _ways(machine: Machine, setting: Setting) -> Iterator[Way]:
    tree, own = setting.tree, decode_kernel(setting.spec)

    def captured(plan: CascadePlan, leaf: DecodeKernel) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            work = setting.captured(machine.platform(), plan, leaf)
            if work is None:
                raise ValueError("no graph of that shape")
            return work

        return make

    yield Way("plain", captured(tree.plan(0), own))
    if len(tree.nodes) > 1:
        yield Way("flashinfer_cascade", lambda: _flashinfer_cascade(machine, setting))
        yield Way("ours_one_level", captured(tree.plan(1), own))
        yield Way("ours", captured(tree.plan(MAX_SHARED), own))
        yield Way("ours, eager", lambda: setting.eager(machine.platform(), tree.plan(MAX_SHARED), own), captured=False)
        for leaf in DECODE_LEAVES:
            if leaf != own:
                yield Way(f"ours, {leaf}", captured(tree.plan(MAX_SHARED), leaf))


def _flashinfer_cascade(machine: Machine, setting: Setting) -> Callable[[], object]:
    """FlashInfer's own composition, the yardstick; only where the real package is."""
    import flashinfer  # the suite measures it against the engine: the package's one door does not need it

    plan, spec = setting.tree.plan(MAX_SHARED), setting.spec
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=machine.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(plan.levels), workspace, "NHD")
    names = ("qo_indptr", "kv_page_indptr", "kv_page_indices", "kv_last_page_len")
    columns = [[column_tensor(getattr(level, name)).to(machine.device) for level in plan.levels] for name in names]
    wrapper.plan(
        *columns, spec.num_qo_heads, spec.num_kv_heads, spec.head_dim, PAGE_SIZE, causal=False, q_data_type=spec.dtype
    )
    k_pool, v_pool = setting.pool.layer(0)
    return lambda: wrapper.run(setting.q, (k_pool, v_pool))


def _floor_s(tree: Tree, spec: AttentionSpec, bytes_per_s: float, flops_per_s: float) -> float:
    """Every node's K/V read once, at the device's rates, level after level."""
    seconds = 0.0
    for nodes, tokens in zip(tree.nodes, tree.tokens, strict=True):
        num_bytes = nodes * tokens * 2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize
        flops = tree.rows * tokens * 4 * spec.num_qo_heads * spec.head_dim
        seconds += max(num_bytes / bytes_per_s, flops / flops_per_s)
    return seconds


def measure_plans(machine: Machine, sizes: Sizes, has_time: Callable[[], bool]) -> list[dict[str, Any]]:
    """Microseconds that the host spends in planning a leaf and the shared levels of each tree."""
    results: list[dict[str, Any]] = []
    for tree in sizes.trees:
        if not has_time():
            results.append({"skipped": f"{tree}: out of time"})
            continue
        setting = Setting(machine, tree, sizes.heads[-1], sizes.head_dim)
        backend = FlashInferAttentionBackend(setting.spec, setting.pool, machine.platform())
        entry: dict[str, Any] = {"tree": str(tree)}
        first, again = tree.plan(MAX_SHARED), tree.plan(MAX_SHARED)
        for name, plan in (("first", first), ("all_levels", again), ("leaf_alone", again)):
            entry[f"{name}_us"] = _planning_us(machine, backend, plan)
        results.append(entry)
    return results


def _planning_us(machine: Machine, backend: FlashInferAttentionBackend, plan: CascadePlan) -> float:
    machine.synchronize()
    started = time.perf_counter()
    backend.prepare(plan)
    machine.synchronize()
    return 1e6 * (time.perf_counter() - started)
