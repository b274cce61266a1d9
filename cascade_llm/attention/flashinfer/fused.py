"""All levels of a decode step in one launch: FlashInfer's `BatchAttention` over virtual requests.

A segment of any level is a request. One persistent kernel takes them all, large tiles and small ones, splits K/V where
that fills the device and merges the splits itself. A request's rows are where it reads queries and where it writes
results, so queries are repeated for each level, and the levels' blocks of results are merged afterwards.

Eager decode steps alone: `plan` waits for the device and bakes lengths, so it can neither be skipped while lengths grow
nor overlap with the step before; causality is one flag for all requests, so every row must see all of its pages.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from cascade_llm.attention.backend import AttentionSpec, PreparedAttention
from cascade_llm.attention.columns import column_tensor
from cascade_llm.attention.flashinfer.levels import FlashInferDevice, LevelOutput
from cascade_llm.device.stream import Mark
from cascade_llm.errors import BackendError, CapacityError
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan

__all__ = ["FusedLevels", "fused_workspace_bytes"]

MAX_POOL_ELEMENTS = 1 << 32
"""The kernel computes offsets into K and V of a layer in 32 bits."""
MAX_WORKS = 65536
"""(tile, chunk, KV head) of a plan."""
TILE_ROWS = (128, 16)
"""Rows x query heads per KV head of the two kinds of tiles."""
PARTIAL_BYTES, LSE_BYTES = 2, 4


class FusedLevels:
    """Plans steps on one `BatchAttention`, which all layers run."""

    def __init__(
        self, device: FlashInferDevice, spec: AttentionSpec, kv_cache: PagedKVCache, num_processors: int
    ) -> None:
        """Raises `BackendError` where the pool is beyond the kernel's offsets, `CapacityError` without memory."""
        elements = kv_cache.num_slots * spec.num_kv_heads * spec.head_dim
        if elements > MAX_POOL_ELEMENTS:
            raise BackendError(
                f"fused_levels: K of a layer has {elements:,} elements, FlashInfer's BatchAttention reaches "
                f"{MAX_POOL_ELEMENTS:,}: give kv_cache_bytes for at most "
                f"{MAX_POOL_ELEMENTS // (spec.num_kv_heads * spec.head_dim):,} tokens, or leave fused_levels out"
            )
        self._device, self._spec, self._kv_cache = device, spec, kv_cache
        self._num_processors = num_processors
        self._wrapper = device.ops.BatchAttention("NHD", device=str(spec.device))
        self._enlarge_workspace()
        self._host = device.stream.pinned(1, torch.int32)
        self._page_indices = torch.empty(1, dtype=torch.int32, device=spec.device)
        self._copied: Mark | None = None

    def serves(self, plan: CascadePlan) -> bool:
        """Whether a step is a decode step that shares, of a size that the kernel's plan holds."""
        levels = _read_levels(plan)
        decodes = plan.num_rows == plan.leaf.num_segments and plan.window_len is None
        return decodes and len(levels) > 1 and self._most_works(levels) <= MAX_WORKS

    def prepare(self, plan: CascadePlan) -> PreparedAttention:
        """Plan a step that is served."""
        levels, spec, page_size = _read_levels(plan), self._spec, self._kv_cache.page_size
        page_entries = [0, *accumulate(len(level.kv_page_indices) for level in levels)]
        qo_indptr = [column_tensor(level.qo_indptr)[1:] + i * plan.num_rows for i, level in enumerate(levels)]
        kv_indptr = [column_tensor(x.kv_page_indptr)[1:] + n for x, n in zip(levels, page_entries, strict=False)]
        zero = torch.zeros(1, dtype=torch.int32)
        self._wrapper.plan(
            torch.cat((zero, *qo_indptr)),
            torch.cat((zero, *kv_indptr)),
            self._pages_on_device(levels, page_entries),
            torch.cat([_lengths(level, page_size) for level in levels]),
            spec.num_qo_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.head_dim,
            page_size,
            causal=False,
            sm_scale=spec.sm_scale,
            q_data_type=spec.dtype,
            kv_data_type=spec.page_dtype,
        )
        return _PreparedFusedAttention(self._device, self._wrapper, spec, self._kv_cache, len(levels), plan.num_rows)

    def _pages_on_device(self, levels: list[CascadeLevel], page_entries: list[int]) -> torch.Tensor:
        """All page indices in memory that the kernel keeps reading until the next plan."""
        count = page_entries[-1]
        if self._copied is not None:
            self._copied.wait()
        if count > len(self._host):
            self._host = self._device.stream.pinned(2 * count, torch.int32)
            self._page_indices = torch.empty(2 * count, dtype=torch.int32, device=self._spec.device)
        for level, begin, end in zip(levels, page_entries[:-1], page_entries[1:], strict=True):
            self._host[begin:end] = column_tensor(level.kv_page_indices)
        self._device.stream.copy(self._page_indices[:count], self._host[:count])
        self._copied = self._device.stream.mark()
        return self._page_indices[:count]

    def _most_works(self, levels: list[CascadeLevel]) -> int:
        """A bound of the works of a plan: tiles by KV heads, and what splitting adds."""
        segments = sum(level.num_segments for level in levels)
        packed = len(levels) * levels[0].num_rows * self._spec.group_size
        splits = 6 * 2 * self._num_processors
        return (segments + packed // TILE_ROWS[1]) * self._spec.num_kv_heads + splits

    def _enlarge_workspace(self) -> None:
        """Give `BatchAttention` a larger workspace where the 384 MiB that it came with are too few."""
        needed = fused_workspace_bytes(self._spec, self._num_processors)
        if needed <= self._wrapper.float_workspace_buffer.numel():
            return
        try:
            workspace = torch.empty(needed, dtype=torch.uint8, device=self._spec.device)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"fused_levels: a workspace of {needed:,} bytes for {self._spec.num_kv_heads} KV heads could not be "
                "allocated: lower gpu_memory_utilization, or leave fused_levels out"
            ) from error
        self._wrapper.float_workspace_buffer = workspace


class _PreparedFusedAttention(PreparedAttention):
    def __init__(
        self,
        device: FlashInferDevice,
        wrapper: object,
        spec: AttentionSpec,
        kv_cache: PagedKVCache,
        num_levels: int,
        num_rows: int,
    ) -> None:
        self._device, self._kv_cache = device, kv_cache
        self._run = wrapper.run  # type: ignore[attr-defined]
        self._shape = (num_levels, num_rows, spec.num_qo_heads, spec.head_dim)
        self._q = torch.empty(self._shape, dtype=spec.dtype, device=spec.device)
        self._blocks = LevelOutput.empty(num_levels * num_rows, spec)

    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PreparedAttention`. Both scales go to the kernel, which multiplies V's into every level's result."""
        k_pool, v_pool = self._kv_cache.layer(layer)
        scale = self._kv_cache.scales[layer]
        scales = {"k_scale": scale.k, "v_scale": scale.v} if (scale.k, scale.v) != (1.0, 1.0) else {}
        self._q.copy_(q)
        out, lse = self._blocks
        self._run(self._q.view(-1, *self._shape[2:]), (k_pool, v_pool), out=out, lse=lse, **scales)
        outs, lses = out.view(self._shape).unbind(), lse.view(self._shape[:3]).unbind()
        for other, other_lse in zip(outs[1:], lses[1:], strict=True):
            self._device.ops.merge_state_in_place(outs[0], lses[0], other, other_lse)
        return outs[0], lses[0]


def fused_workspace_bytes(spec: AttentionSpec, num_processors: int) -> int:
    """What `BatchAttention` sets aside for split results, by its planner's arithmetic (scheduler.cuh)."""
    blocks = num_processors * (1 if spec.head_dim >= 256 else 2)
    splits = 4 * blocks * sum(TILE_ROWS)
    partial = splits * spec.num_kv_heads * spec.head_dim * PARTIAL_BYTES
    return _aligned(partial) + _aligned(splits * spec.num_kv_heads * LSE_BYTES)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def _read_levels(plan: CascadePlan) -> list[CascadeLevel]:
    """The leaf, then the shared levels that hold pages."""
    return [plan.leaf, *(level for level in plan.shared_levels if len(level.kv_page_indices))]


def _lengths(level: CascadeLevel, page_size: int) -> torch.Tensor:
    """Tokens of each segment, int32."""
    pages = column_tensor(level.kv_page_indptr).diff()
    lengths = (pages - 1) * page_size + column_tensor(level.kv_last_page_len)
    return lengths.masked_fill(pages == 0, 0)
