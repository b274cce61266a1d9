"""Cascade attention on FlashInfer's kernels, planned anew for each step: the eager half of the GPU path.

Serves prefill and mixed steps, and decode steps that fit no captured graph. Shared levels keep their plan for as long
as the level object lives; the leaf is planned every step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec, PreparedAttention, column_tensor
from cascade_llm.attention.flashinfer.kernels import device_arch, kernel_folder
from cascade_llm.attention.flashinfer.levels import (
    DecodeKernel,
    FlashInferDevice,
    LevelColumns,
    LevelKernel,
    LevelOutput,
    LevelRun,
    attend_levels,
    decode_kernel,
)
from cascade_llm.attention.flashinfer.ops import FlashInferOps, load_flashinfer_ops
from cascade_llm.attention.flashinfer.window_cut import cut_leaf
from cascade_llm.attention.flashinfer.workspace import float_workspace_bytes
from cascade_llm.device.stream import CudaStream, DeviceStream
from cascade_llm.errors import BackendError
from cascade_llm.kv_cache.paged_kv_cache import KVLayout, PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan

__all__ = ["FlashInferAttentionBackend", "GpuPlatform"]


@dataclass(frozen=True)
class GpuPlatform:
    """A GPU as the engine uses it: FlashInfer's calls and a stream. Tests put doubles in their place."""

    ops: FlashInferOps
    stream: DeviceStream
    num_processors: int
    """Streaming multiprocessors, which FlashInfer's planner wants to fill."""
    arch: tuple[int, int]
    """Compute capability."""

    @classmethod
    def cuda(cls, device: torch.device) -> GpuPlatform:
        """The real one."""
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        prebuilt = kernel_folder(device_arch(device))
        ops = load_flashinfer_ops(prebuilt if prebuilt.exists() else None)
        return cls(ops, CudaStream(device), num_processors, torch.cuda.get_device_capability(device))


class FlashInferAttentionBackend(AttentionBackend):
    """Attention by FlashInfer's paged kernels; needs a CUDA device, 16-bit types and a head size that they know."""

    slot_dtype = torch.int32

    def __init__(
        self,
        spec: AttentionSpec,
        kv_cache: PagedKVCache,
        platform: GpuPlatform | None = None,
        decode_leaf: DecodeKernel | None = None,
        graph_shapes: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> None:
        """Set the workspace aside.

        Args:
            spec: the model's attention
            kv_cache: pages in the layout NHD
            platform: default the CUDA device of `spec`
            decode_leaf: default the choice for this model
            graph_shapes: rows, and segments of each shared level, of the graphs that will be captured
        """
        super().__init__(spec, kv_cache)
        if kv_cache.layout != "NHD":
            raise BackendError(f"the flashinfer backend reads NHD pages, not {kv_cache.layout}: create the pool so")
        assert kv_cache.dtype == spec.page_dtype
        platform = platform or GpuPlatform.cuda(spec.device)
        self.decode_leaf = decode_leaf or decode_kernel(spec)
        self.platform = platform
        workspace_bytes = float_workspace_bytes(spec, platform.num_processors, graph_shapes)
        self.device = FlashInferDevice.create(platform.ops, platform.stream, workspace_bytes)
        self._leaves: dict[tuple[bool, int | None], LevelKernel] = {}
        self._shared: dict[int | None, list[_SharedLevel]] = {}
        self._edges: dict[int | None, LevelKernel] = {}
        self._append_table = _append_table(kv_cache)

    @staticmethod
    def preferred_layout(device: torch.device) -> KVLayout:
        """NHD, FlashInfer's default."""
        return "NHD"

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """See `AttentionBackend`: k, v [rows, num_kv_heads, head_dim], slots [rows] int32.

        The pool is one request over all pages in order, so a slot is a position in it.
        """
        indices, indptr, last_page_len, batch_indices = self._append_table
        if len(slots) > len(batch_indices):
            batch_indices = torch.zeros_like(slots)
        k_pool, v_pool = self.kv_cache.layer(layer)
        scale = self.kv_cache.scales[layer]
        k, v = self.kv_cache.encode(k, scale.k), self.kv_cache.encode(v, scale.v)  # append looks at no dtype
        self.device.ops.append_paged_kv_cache(
            k, v, batch_indices[: len(slots)], slots, (k_pool, v_pool), indices, indptr, last_page_len, "NHD"
        )

    def prepare(self, plan: CascadePlan) -> PreparedAttention:
        """Plan the leaf, and those shared levels that are not the objects planned last."""
        assert plan.page_size == self.kv_cache.page_size
        leaf, cut = self._leaf_kernel(plan), cut_leaf(plan)
        if cut is None:
            leaf.plan(self.columns(plan.leaf, plan.leaf.num_segments))
        else:
            leaf.plan(self._on_device(cut.rest))
        shared = self._shared.setdefault(
            plan.window_len, []
        )  # by kind: all kinds of a step are prepared before it runs
        while len(shared) < len(plan.shared_levels):
            shared.append(_SharedLevel(self))
        runs = [mine.planned(level) for mine, level in zip(shared, plan.shared_levels, strict=False)]
        if cut is not None:
            runs.append(self._planned_edge(plan.window_len, cut.edge))
        return _PreparedFlashInferAttention(self, leaf, [run for run in runs if run.num_rows], plan.num_rows)

    def columns(self, level: CascadeLevel, num_segments: int) -> LevelColumns:
        """The first segments of a level; the page indices on the device, through pinned memory: FlashInfer would copy
        them from where they are, and wait for the stream where they are many."""
        kv_page_indptr = level.kv_page_indptr[: num_segments + 1]
        return LevelColumns(
            column_tensor(level.qo_indptr[: num_segments + 1]),
            column_tensor(kv_page_indptr),
            self.device.stream.upload(column_tensor(level.kv_page_indices[: kv_page_indptr[-1]])),
            column_tensor(level.kv_last_page_len[:num_segments]),
        )

    def _on_device(self, columns: LevelColumns) -> LevelColumns:
        """Columns on the host as a kernel's plan takes them, see `columns`."""
        return columns._replace(kv_page_indices=self.device.stream.upload(columns.kv_page_indices))

    def _planned_edge(self, window_len: int | None, edge: LevelColumns) -> LevelRun:
        """Plan what windows cut off the leaf of a kind, which is read token by token."""
        kernel = self._edges.get(window_len)
        if kernel is None:
            kernel = self._edges[window_len] = LevelKernel(self.device, self.spec, 1, "prefill_fa2")
        kernel.plan(self._on_device(edge))
        return LevelRun(kernel, int(edge.qo_indptr[-1]))

    def _leaf_kernel(self, plan: CascadePlan) -> LevelKernel:
        decodes = plan.num_rows == plan.leaf.num_segments
        kernel = self._leaves.get((decodes, plan.window_len))
        if kernel is None:
            kernel = self._leaves[decodes, plan.window_len] = LevelKernel(
                self.device,
                self.spec,
                self.kv_cache.page_size,
                self.decode_leaf if decodes else "prefill_fa2",
                causal=True,
                window_len=plan.window_len,
            )
        return kernel


class _SharedLevel:
    """The wrapper of one depth, and the level that it is planned for."""

    def __init__(self, backend: FlashInferAttentionBackend) -> None:
        self._columns = backend.columns
        self._kernel = LevelKernel(backend.device, backend.spec, backend.kv_cache.page_size, "prefill_fa2")
        self._level: weakref.ref[CascadeLevel] | None = None
        self._num_rows = 0

    def planned(self, level: CascadeLevel) -> LevelRun:
        if self._level is None or self._level() is not level:
            num_segments = _num_read_segments(level)
            self._num_rows = level.qo_indptr[num_segments]
            if num_segments:
                self._kernel.plan(self._columns(level, num_segments))
            self._level = weakref.ref(level)
        return LevelRun(self._kernel, self._num_rows)


class _PreparedFlashInferAttention(PreparedAttention):
    def __init__(
        self, backend: FlashInferAttentionBackend, leaf: LevelKernel, shared: list[LevelRun], num_rows: int
    ) -> None:
        self._device, self._kv_cache = backend.device, backend.kv_cache
        self._leaf, self._shared = leaf, shared
        self._result = LevelOutput.empty(num_rows, backend.spec)
        self._partial = LevelOutput.empty(max(run.num_rows for run in shared), backend.spec) if shared else None

    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PreparedAttention`."""
        k_pool, v_pool = self._kv_cache.layer(layer)
        scale = self._kv_cache.scales[layer]
        attend_levels(self._device, q, (k_pool, v_pool), self._leaf, self._shared, self._result, self._partial, scale)
        return self._result


def _num_read_segments(level: CascadeLevel) -> int:
    """Segments up to the last that holds pages. Empty ones behind it would only enlarge the kernel's grid, and make
    its tiles too small, which are chosen from the mean of all."""
    num_segments = level.num_segments
    while num_segments and level.kv_page_indptr[num_segments] == level.kv_page_indptr[num_segments - 1]:
        num_segments -= 1
    return num_segments


def _append_table(kv_cache: PagedKVCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Page indices, indptr, last_page_len of one request over the whole pool, and the request of each row: 0."""

    def column(values: torch.Tensor) -> torch.Tensor:
        return values.to(torch.int32).to(kv_cache.device)

    return (
        column(torch.arange(kv_cache.num_pages)),
        column(torch.tensor([0, kv_cache.num_pages])),
        column(torch.tensor([kv_cache.page_size])),
        column(torch.zeros(8192)),
    )
