"""Attention over the segments of one level.

A level becomes a few batches of segments (`segment_batch`), a batch two matrix products around a softmax (`dense`):
the rows of a segment, times the query heads of a KV head, are the rows of one product against the segment's keys, so
K/V that many rows share are read once for all of them.
"""

from __future__ import annotations

import torch

from cascade_llm.attention.backend import AttentionSpec, column_tensor
from cascade_llm.attention.dense import Workspace, dense_attention
from cascade_llm.attention.segment_batch import Blocking, RowBlock, SegmentBatch, read_segments, split_into_batches
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan

__all__ = ["LevelAttention"]


class LevelAttention:
    """Attention of all rows of a step to one level: a leaf, or shared segments."""

    def __init__(
        self,
        level: CascadeLevel,
        spec: AttentionSpec,
        kv_cache: PagedKVCache,
        num_slots: int,
        workspace: Workspace,
        blocking: Blocking,
        *,
        leaf_of: CascadePlan | None = None,
    ) -> None:
        """Batch the segments.

        Args:
            num_slots: of a layer's pool, in the layers that read by the plan
            leaf_of: the plan whose leaf the level is, so that its rows are masked; None for a shared level
        """
        self._num_rows = level.num_rows
        pages = column_tensor(level.kv_page_indices).to(spec.device, torch.int64)
        self._batches = []
        windows = leaf_of.leaf_window_lens() if leaf_of else None
        for segments in split_into_batches(read_segments(level, kv_cache.page_size, windows), blocking, spec):
            scores_per_row = spec.num_qo_heads * len(segments) * max(s.kv_len for s in segments)
            batch = SegmentBatch.build(
                segments,
                pages,
                kv_cache.page_size,
                causal=leaf_of is not None,
                max_rows_per_block=max(1, blocking.scores_per_block // scores_per_row),
            )
            self._batches.append(_BatchAttention(batch, spec, kv_cache, num_slots, workspace))

    @property
    def is_empty(self) -> bool:
        """Whether no segment holds pages."""
        return not self._batches

    def keep_gathered(self, max_bytes: int) -> int:
        """From the next `attend` on, keep the gathered K/V of each layer, if they fit; the bytes that they will take.

        Right only while the pages that the level names stay as they are.
        """
        kept = 0
        for batch in self._batches:
            if kept + batch.gathered_bytes <= max_bytes:
                batch.keep_gathered()
                kept += batch.gathered_bytes
        return kept

    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of all rows; (0, -inf) for rows whose segment is empty.

        Args:
            q: [rows, num_qo_heads, head_dim]

        Returns:
            out like q; lse [rows, num_qo_heads], float32, base 2
        """
        if len(self._batches) == 1 and self._batches[0].batch.rows == slice(0, self._num_rows):
            return self._batches[0].attend(layer, q)
        out = torch.zeros_like(q)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float32, device=q.device)
        for attention in self._batches:
            batch, (batch_out, batch_lse) = attention.batch, attention.attend(layer, q)
            out[batch.real_rows], lse[batch.real_rows] = batch_out[batch.real], batch_lse[batch.real]
        return out, lse


class _BatchAttention:
    def __init__(
        self, batch: SegmentBatch, spec: AttentionSpec, kv_cache: PagedKVCache, num_slots: int, workspace: Workspace
    ) -> None:
        self.batch, self._spec, self._kv_cache, self._workspace = batch, spec, kv_cache, workspace
        heads = torch.arange(spec.num_kv_heads, device=batch.slots.device)
        slots = torch.stack((batch.slots, batch.slots + num_slots)).unsqueeze(2)
        # [2 (K, V), segments, num_kv_heads, kv_len]: the pool's vectors of head_dim in the order the products want
        self._vectors = (slots * spec.num_kv_heads + heads[:, None]).flatten()
        self._kept: dict[int, torch.Tensor] | None = None

    @property
    def gathered_bytes(self) -> int:
        """What the gathered K/V of all layers take."""
        return len(self._vectors) * self._spec.head_dim * self._spec.dtype.itemsize * self._spec.num_layers

    def keep_gathered(self) -> None:
        """See `LevelAttention.keep_gathered`."""
        if self._kept is None:
            self._kept = {}

    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of the batch's rows, padding included: out [padded rows, num_qo_heads, head_dim] and its lse."""
        batch, spec = self.batch, self._spec
        q_rows = q[batch.rows].view(
            batch.num_segments, batch.num_rows, spec.num_kv_heads, spec.group_size, spec.head_dim
        )
        keys, values = self._keys_values(layer, q.dtype)
        blocks = [self._attend_block(block, q_rows[:, block.rows], keys, values) for block in batch.blocks]
        out, lse = blocks[0] if len(blocks) == 1 else (torch.cat(parts, 1) for parts in zip(*blocks, strict=True))
        return out.reshape(-1, spec.num_qo_heads, spec.head_dim), lse.reshape(-1, spec.num_qo_heads)

    def _attend_block(
        self, block: RowBlock, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and out [segments, rows, num_kv_heads, group_size, head_dim]; lse without the last dimension."""
        by_head = q.transpose(1, 2)
        out, lse = dense_attention(
            by_head.reshape(len(keys), -1, self._spec.head_dim),
            keys[:, block.keys].contiguous(),  # else the product makes a copy, and transposes it
            values[:, block.keys],
            self._spec.sm_scale,
            block.bias,
            self._workspace,
            self._spec.logits_soft_cap,
        )
        return out.view(by_head.shape).transpose(1, 2), lse.view(by_head.shape[:-1]).transpose(1, 2)

    def _keys_values(self, layer: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, both [segments * num_kv_heads, kv_len, head_dim]."""
        kept = self._kept
        gathered = kept.get(layer) if kept is not None else None
        if gathered is None:
            gathered = self._gather(layer, dtype)
            if kept is not None:
                gathered = kept[layer] = gathered.clone()
        keys, values = gathered.view(2, -1, self.batch.kv_len, self._spec.head_dim)
        return keys, values

    def _gather(self, layer: int, dtype: torch.dtype) -> torch.Tensor:
        """K and V as numbers of `dtype`: [2 * segments * num_kv_heads * kv_len, head_dim]."""
        kv_cache, head_dim = self._kv_cache, self._spec.head_dim
        stored = kv_cache.layer(layer).view(-1, head_dim)
        vectors = stored.view(torch.uint8) if stored.dtype.itemsize == 1 else stored  # torch indexes no 8-bit floats
        out = self._workspace.take("kv", (len(self._vectors), head_dim), vectors.dtype)
        gathered = torch.index_select(vectors, 0, self._vectors, out=out).view(stored.dtype)
        if stored.dtype == dtype:
            return gathered
        if (own_scales := kv_cache.vector_scales(layer)) is not None:
            scales = own_scales.flatten()[self._vectors].view(2, -1, 1)
        else:
            scales = torch.tensor(kv_cache.scales[layer], device=vectors.device).view(2, 1, 1)
        return (gathered.view(2, -1, head_dim).float() * scales).to(dtype).view(-1, head_dim)
