"""Attention of one plan as graphs have it, without an engine: fixed capacities, and tiles chosen by them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from cascade_llm.attention.backend import AttentionSpec, column_tensor
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.graph import GraphAttention, SharedColumns
from cascade_llm.attention.flashinfer.levels import DecodeKernel, LevelBuffers, LevelColumns
from cascade_llm.bench.attention_cases import PAGE_SIZE, AttentionCase
from cascade_llm.device.stream import DeviceStream
from cascade_llm.kv_cache.paged_kv_cache import KVScale, PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan
from cascade_llm.tiling import max_tiles
from cascade_llm.worker.graph_shapes import GraphShape, fitting_shape, graph_shapes
from scripts.gpu_suite.machine import Machine

__all__ = ["Setting", "head_spec"]

POOL_BYTES = 4 << 30
"""At most so much is rotated."""
CACHES_FILLED = 3
"""K/V of all layers fill the last-level cache so many times, so that no layer finds its own there."""


def head_spec(
    machine: Machine, heads: tuple[int, int, int], num_layers: int = 1, kv_dtype: torch.dtype | None = None
) -> AttentionSpec:
    """Attention of (query heads, KV heads, head size)."""
    return AttentionSpec(
        num_layers=num_layers,
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        sm_scale=heads[2] ** -0.5,
        dtype=machine.dtype,
        device=machine.device,
        kv_dtype=kv_dtype,
    )


class Setting:
    """One tree of K/V on one head layout: layers of random K/V, which are read in turn, and random queries."""

    def __init__(
        self,
        machine: Machine,
        case: AttentionCase,
        heads: tuple[int, int, int],
        kv_dtype: torch.dtype | None = None,
        scale: KVScale | None = None,
    ) -> None:
        """`kv_dtype`: of the pages, where it is not the machine's; `scale`: theirs, where they are of 8 bits."""
        spec = head_spec(machine, heads, kv_dtype=kv_dtype)
        layer_bytes = 2 * case.num_pages * PAGE_SIZE * heads[1] * heads[2] * spec.page_dtype.itemsize
        most = max(1, min(POOL_BYTES, machine.memory_bytes // 4) // layer_bytes)
        self.num_layers = min(most, -(-CACHES_FILLED * machine.card.l2_bytes // layer_bytes))
        self.spec = head_spec(machine, heads, self.num_layers, kv_dtype)
        self.pool = PagedKVCache(
            num_layers=self.num_layers,
            num_pages=case.num_pages + 1,
            page_size=PAGE_SIZE,
            num_kv_heads=heads[1],
            head_dim=heads[2],
            dtype=self.spec.page_dtype,
            device=machine.device,
            scales=None if scale is None else [scale] * self.num_layers,
        )
        for layer in range(self.num_layers):
            pages = self.pool.layer(layer)
            pages.copy_(torch.randn(pages.shape, device=machine.device))
        self.q = torch.randn(case.num_sequences, heads[0], heads[2], device=machine.device).to(machine.dtype)
        self._platform = machine.platform()

    def backend(
        self, leaf: DecodeKernel | None = None, shapes: Sequence[GraphShape] = ()
    ) -> FlashInferAttentionBackend:
        """A backend over the pool.

        Args:
            leaf: what serves the leaf, default the choice for these heads
            shapes: of the graphs to be captured
        """
        return FlashInferAttentionBackend(self.spec, self.pool, self._platform, leaf, shapes)

    def captured(self, plan: CascadePlan, leaf: DecodeKernel | None = None) -> Callable[[], object] | None:
        """Attention of all layers in turn, ready to be captured; None where no graph has the plan's shape."""
        group, platform = self.spec.group_size, self._platform
        shapes = [s for s in graph_shapes(plan.num_rows, group, len(plan.shared_levels)) if s.rows == plan.num_rows]
        shape = fitting_shape(plan, shapes, group, max_tiles(platform.num_processors, self.spec.num_kv_heads))
        if shape is None:
            return None
        attention = _graph_attention(self.backend(leaf, [shape]), plan, shape)
        return lambda: [attention.attend(layer, self.q) for layer in range(self.num_layers)]


def _graph_attention(backend: FlashInferAttentionBackend, plan: CascadePlan, shape: GraphShape) -> GraphAttention:
    stream, device = backend.device.stream, backend.spec.device
    leaf = _padded(plan.leaf, shape.rows)
    buffers = LevelBuffers(*(column.to(device) for column in leaf))
    shared = [SharedColumns(capacity, backend.kv_cache.num_pages, device) for capacity in shape.capacities]
    attention = GraphAttention(backend, shape.rows, shape.capacities, buffers, shared, backend.platform.num_processors)
    attention.plan_leaf(LevelColumns(*(_pinned(stream, column) for column in leaf)), None)
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


def _pinned(stream: DeviceStream, column: torch.Tensor) -> torch.Tensor:
    buffer = stream.pinned(max(1, len(column)), torch.int32)[: len(column)]
    return buffer.copy_(column)
