"""Cascade attention inside CUDA graphs: fixed buffers, padding, and plans that are made as rarely as kernels allow.

A captured kernel reads two things at each replay: its plan (which tile does what), written by FlashInfer's planner,
and the level's columns (which rows, which pages), in buffers whose addresses never change. Every graph owns its plans.
The columns of a level position are one set of buffers for all graphs, of which each uses as much as it has segments.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cascade_llm.attention.backend import PreparedAttention
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.levels import (
    LevelBuffers,
    LevelColumns,
    LevelKernel,
    LevelOutput,
    LevelRun,
    attend_levels,
)
from cascade_llm.attention.flashinfer.workspace import leaf_splits, shared_level_splits
from cascade_llm.plan import CascadeLevel, IntColumn

__all__ = ["GraphAttention", "SharedColumns"]


class SharedColumns:
    """The columns of one level position on the device, and whose they are now."""

    def __init__(self, max_segments: int, max_pages: int, device: torch.device) -> None:
        def column(length: int) -> torch.Tensor:
            return torch.zeros(length, dtype=torch.int32, device=device)

        self._buffers = LevelBuffers(
            column(max_segments + 1), column(max_segments + 1), column(max_pages), column(max_segments)
        )
        self.owner: GraphAttention | None = None
        """the graph whose columns are in the buffers"""

    def first(self, segments: int) -> LevelBuffers:
        """The buffers of a graph with that many segments."""
        qo_indptr, kv_page_indptr, kv_page_indices, kv_last_page_len = self._buffers
        return LevelBuffers(
            qo_indptr[: segments + 1], kv_page_indptr[: segments + 1], kv_page_indices, kv_last_page_len[:segments]
        )


@dataclass(slots=True)
class _SharedLevel:
    kernel: LevelKernel
    columns: SharedColumns
    level: weakref.ref[CascadeLevel] | None = None


class GraphAttention(PreparedAttention):
    """Attention of one graph: what it captured, and how its buffers and plans follow the steps."""

    def __init__(
        self,
        backend: FlashInferAttentionBackend,
        rows: int,
        capacities: Sequence[int],
        leaf_buffers: LevelBuffers,
        shared_columns: Sequence[SharedColumns],
        num_processors: int,
        *,
        window_len: int | None = None,
        edge_buffers: LevelBuffers | None = None,
    ) -> None:
        """Make the kernels.

        Args:
            backend: whose pool they read
            rows: of the graph
            capacities: segments of each shared level
            leaf_buffers: of exactly `rows` segments; their memory is filled by the caller before each replay
            shared_columns: of each shared level
            num_processors: of the device
            window_len: of the attention kind, which masks the leaf
            edge_buffers: of what windows cut off the leaf, in pages of one token, filled in the same way
        """
        self._device, self._kv_cache, spec = backend.device, backend.kv_cache, backend.spec
        self.rows, self.capacities = rows, tuple(capacities)
        decode_leaf, common = backend.decode_leaf, (self._device, spec, backend.kv_cache.page_size)
        splits = leaf_splits(rows, spec, num_processors)
        self._leaf_indices = leaf_buffers.kv_page_indices
        self._leaf = LevelKernel(*common, decode_leaf, buffers=leaf_buffers, split_kv=splits, window_len=window_len)
        self._edge = None
        if edge_buffers is not None:
            self._edge = LevelKernel(self._device, spec, 1, "prefill_fa2", buffers=edge_buffers, split_kv=False)
        self._leaf_follows_pages = splits or decode_leaf == "decode_cuda_cores"
        self._leaf_pages: IntColumn | None = None
        self._shared = [
            _SharedLevel(
                LevelKernel(
                    *common,
                    "prefill_fa2",
                    buffers=columns.first(capacity),
                    split_kv=shared_level_splits(rows, capacity, spec, num_processors),
                ),
                columns,
            )
            for capacity, columns in zip(self.capacities, shared_columns, strict=False)
        ]
        self._result = LevelOutput.empty(rows, spec)
        self._partial = LevelOutput.empty(rows, spec) if self._shared else None

    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PreparedAttention`; q has as many rows as the graph."""
        k_pool, v_pool = self._kv_cache.layer(layer)
        runs = [LevelRun(shared.kernel, self.rows) for shared in self._shared]
        if self._edge is not None:
            runs.append(LevelRun(self._edge, self.rows))
        scale = self._kv_cache.scales[layer]
        attend_levels(self._device, q, (k_pool, v_pool), self._leaf, runs, self._result, self._partial, scale)
        return self._result

    def plan_leaf(self, columns: LevelColumns, pages: IntColumn | None) -> None:
        """Plan the leaf where its kernel's plan depends on page counts and these are not the ones planned last.

        Without split K/V a plan holds for all lengths: then the first is the last.

        Args:
            columns: padded, on pinned host memory; the page indices are in the leaf's buffer already
            pages: a column of the plan that is another object where page counts are others; None plans in any case
        """
        if pages is None or (self._leaf_follows_pages and pages is not self._leaf_pages):
            self._leaf.plan(columns._replace(kv_page_indices=self._leaf_indices[:0]))
            self._leaf_pages = pages

    def plan_edge(self, columns: LevelColumns) -> None:
        """Plan the edge, once: K/V are not split, so the plan holds for all lengths."""
        assert self._edge is not None
        self._edge.plan(columns)

    def holds(self, position: int, level: CascadeLevel) -> bool:
        """Whether a shared level is planned and its columns are in place."""
        shared = self._shared[position]
        return shared.columns.owner is self and shared.level is not None and shared.level() is level

    def plan_shared(self, position: int, level: CascadeLevel | None, columns: LevelColumns) -> None:
        """Plan a shared level.

        Args:
            position: 0 is the coarsest
            level: what is planned; None for a stand-in
            columns: padded to the capacity, on pinned host memory
        """
        shared = self._shared[position]
        num_pages = len(columns.kv_page_indices)
        indices = shared.columns.first(self.capacities[position]).kv_page_indices
        if num_pages:
            self._device.stream.copy(indices[:num_pages], columns.kv_page_indices)
        # the page indices are where they belong already: the wrapper has none left to copy
        shared.kernel.plan(columns._replace(kv_page_indices=indices[:0]))
        shared.columns.owner, shared.level = self, weakref.ref(level) if level is not None else None
