"""Cascade attention in plain torch: every level by the same dense code, on any device.

A level becomes a few batches of segments (`segment_batch`), a batch two matrix products around a softmax (`dense`):
the rows of a segment, times the query heads of a KV head, are the rows of one product against the segment's keys, so
shared K/V are read once for all sharers. Levels are joined by their log-sum-exp (`merge_state`). A plan without shared
levels is plain attention by the same code.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec, PreparedAttention
from cascade_llm.attention.columns import column_tensor
from cascade_llm.attention.dense import Workspace, dense_attention
from cascade_llm.attention.merge_state import merge_state_in_place
from cascade_llm.attention.segment_batch import Blocking, SegmentBatch, read_segments, split_into_batches
from cascade_llm.errors import BackendError
from cascade_llm.kv_cache.paged_kv_cache import KVLayout, PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan

__all__ = ["TorchAttentionBackend"]


class TorchAttentionBackend(AttentionBackend):
    """Attention in torch operators, for CPU and, where no better backend can be used, CUDA."""

    def __init__(self, spec: AttentionSpec, kv_cache: PagedKVCache, blocking: Blocking | None = None) -> None:
        super().__init__(spec, kv_cache)
        layout = self.preferred_layout(spec.device)
        if kv_cache.layout != layout:
            raise BackendError(f"the torch backend reads {layout} pages, not {kv_cache.layout}: create the pool so")
        self.blocking = blocking or Blocking()
        self.workspace = Workspace(spec.device)
        self._shared: WeakKeyDictionary[CascadeLevel, _LevelAttention] = WeakKeyDictionary()

    @staticmethod
    def preferred_layout(device: torch.device) -> KVLayout:
        """NHD: a row is written in one piece and consecutive pages are read in place, as fast as HND is gathered."""
        return "NHD"

    def prepare(self, plan: CascadePlan) -> PreparedAttention:
        """Batch the segments of a plan; a shared level that is the same object as before is taken over whole."""
        assert plan.page_size == self.kv_cache.page_size
        shared = []
        for level in plan.shared_levels:
            attention = self._shared.get(level)
            if attention is None:
                attention = self._shared[level] = _LevelAttention(self, level)
            shared.append(attention)
        return _PreparedTorchAttention(_LevelAttention(self, plan.leaf, plan), shared)


class _PreparedTorchAttention(PreparedAttention):
    def __init__(self, leaf: _LevelAttention, shared: list[_LevelAttention]) -> None:
        self._leaf = leaf
        self._shared = [level for level in shared if level.batches]

    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = self._leaf.attend(layer, q)
        if not self._shared:
            return out, lse
        merged = out.float()
        for level in self._shared:
            merge_state_in_place(merged, lse, *level.attend(layer, q))
        return merged.to(q.dtype), lse


class _LevelAttention:
    """Attention over the segments of one level.

    A shared level keeps the K/V that it had to gather, layer by layer, from the first `attend` on: at `prepare` they
    may not be written yet, and afterwards its pages are full and stay as they are for as long as the level is planned.
    They are keyed by the level object alone, because equal page ids in another level may hold other tokens.
    Memory: at most the shared K/V a second time, nothing for segments in consecutive pages.
    """

    def __init__(self, backend: TorchAttentionBackend, level: CascadeLevel, leaf_of: CascadePlan | None = None) -> None:
        spec, blocking = backend.spec, backend.blocking
        self._spec, self._kv_cache, self._workspace = spec, backend.kv_cache, backend.workspace
        self._is_leaf, self._num_rows = leaf_of is not None, level.num_rows
        pages = column_tensor(level.kv_page_indices).to(spec.device, torch.int64)
        self.batches: list[_BatchAttention] = []
        for segments in split_into_batches(read_segments(level, backend.kv_cache.page_size), blocking):
            scores_per_row = spec.num_qo_heads * len(segments) * max(s.kv_len for s in segments)
            batch = SegmentBatch.build(
                segments,
                pages,
                backend.kv_cache.page_size,
                causal=self._is_leaf,
                window_len=leaf_of.window_len if leaf_of else None,
                rows_per_block=max(1, blocking.scores_per_block // scores_per_row),
            )
            self.batches.append(_BatchAttention(batch, backend, keep=not self._is_leaf))

    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of all rows to this level: out like q, lse [rows, num_qo_heads]; (0, -inf) in empty segments."""
        if len(self.batches) == 1 and self.batches[0].covers(self._num_rows):
            return self.batches[0].attend(layer, q)
        out = torch.empty_like(q) if self._is_leaf else torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
        for batch in self.batches:
            batch.attend_into(layer, q, out, lse)
        return out, lse


class _BatchAttention:
    """Attention over one batch of segments."""

    def __init__(self, batch: SegmentBatch, backend: TorchAttentionBackend, *, keep: bool) -> None:
        self._batch, self._spec = batch, backend.spec
        self._kv_cache, self._workspace = backend.kv_cache, backend.workspace
        self._kept: dict[int, torch.Tensor] | None = {} if keep else None
        slots = batch.slots
        if isinstance(slots, slice):
            self._source: slice | torch.Tensor = slots
        else:
            heads, pool = torch.arange(self._spec.num_kv_heads, device=slots.device), self._kv_cache.num_slots
            token = torch.stack((slots, slots + pool)).unsqueeze(2)
            self._source = (token * len(heads) + heads[:, None]).flatten()

    def covers(self, num_rows: int) -> bool:
        """Whether this batch holds all rows of the step in order."""
        return self._batch.rows == slice(0, num_rows)

    def attend_into(self, layer: int, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Fill the rows of this batch."""
        rows, real = self._batch.rows, self._batch.real_rows
        batch_out, batch_lse = self.attend(layer, q)
        if real is not None:
            assert isinstance(rows, torch.Tensor)
            rows, batch_out, batch_lse = rows[real], batch_out[real], batch_lse[real]
        out[rows], lse[rows] = batch_out, batch_lse

    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the batch's rows, padding included: out [padded rows, num_qo_heads, head_dim] and lse."""
        batch, spec = self._batch, self._spec
        by_head = (batch.num_segments, batch.num_rows, spec.num_kv_heads, spec.group_size)
        q_rows = q[batch.rows].view(*by_head, spec.head_dim).transpose(1, 2)
        out = torch.empty(*by_head, spec.head_dim, dtype=q.dtype, device=q.device)
        lse = torch.empty(by_head, device=q.device)
        keys, values = self._keys_values(layer, q.dtype)
        for block in batch.blocks:
            q_block = q_rows[:, :, block.rows]
            block_out, block_lse = dense_attention(
                q_block.reshape(len(keys), -1, spec.head_dim),
                keys[:, block.keys],
                values[:, block.keys],
                spec.sm_scale,
                block.bias,
                self._workspace,
            )
            out[:, block.rows] = block_out.view(q_block.shape).transpose(1, 2)
            lse[:, block.rows] = block_lse.view(q_block.shape[:-1]).transpose(1, 2)
        return out.view(-1, spec.num_qo_heads, spec.head_dim), lse.view(-1, spec.num_qo_heads)

    def _keys_values(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, both [segments * num_kv_heads, kv_len, head_dim]; kept, gathered or read in place."""
        if self._kept is None:
            kv = self._load(layer, dtype)
        elif layer in self._kept:
            kv = self._kept[layer]
        else:
            kv = self._load(layer, dtype)
            if not isinstance(self._source, slice):
                self._kept[layer] = kv
        keys, values = kv
        return keys, values

    def _load(self, layer: int, dtype: torch.dtype) -> torch.Tensor:
        pool, spec = self._kv_cache.layer(layer), self._spec
        if isinstance(self._source, slice):
            kv = pool.view(2, -1, spec.num_kv_heads, spec.head_dim)[:, self._source].transpose(1, 2)
        else:
            kv = pool.view(-1, spec.head_dim).index_select(0, self._source)
            kv = kv.view(2, -1, self._batch.kv_len, spec.head_dim)
        return kv.to(dtype)
