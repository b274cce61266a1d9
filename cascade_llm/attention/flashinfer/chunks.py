"""A shared level on fa3, its prefixes cut into chunks that are requests of their own.

fa3 computes twice as fast as fa2 on Hopper, but it does not split K/V, and it gives each query head a tile of 128 rows.
So few rows on one long prefix leave most of the device idle. Both is mended by hand: rows of the query heads that share
a KV head are put below each other (q [n, num_qo_heads, d] becomes [n * group_size, num_kv_heads, d]), and that block is
repeated for each chunk, since a request's rows are where it reads queries and where it writes results. Then the chunks'
results are merged (Dao et al., Flash-Decoding, 2023, does this inside the kernel).

fa3 takes lengths from its plan. Those of a shared level do not change while it is the same object, so it is planned
again on a change of membership only, as other shared levels are.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer.levels import (
    FlashInferDevice,
    LevelBuffers,
    LevelColumns,
    LevelKernel,
    LevelOutput,
)
from cascade_llm.attention.flashinfer.table import ChunkRule, fa3_tile_rows

__all__ = ["ChunkedLevelKernel", "cut_level"]


class ChunkedLevelKernel:
    """Serves a shared level as `LevelKernel` does.

    With `buffers` it is in CUDA-graph mode, for `rows` rows: the number of chunks is fixed too, and segments that are
    too short for so many leave the rest empty.
    """

    def __init__(
        self,
        device: FlashInferDevice,
        spec: AttentionSpec,
        page_size: int,
        rule: ChunkRule,
        num_processors: int,
        *,
        rows: int = 0,
        buffers: LevelBuffers | None = None,
    ) -> None:
        self._device, self._spec, self._page_size = device, spec, page_size
        self._rule, self._num_processors = rule, num_processors
        self._host: LevelColumns | None = None
        self.num_chunks = 1
        mine = None
        if buffers is not None:
            self.num_chunks = rule.num_chunks(self._num_tiles([rows]), num_processors)
            num_requests = self.num_chunks * len(buffers.kv_last_page_len)
            mine = self._fixed_columns(num_requests, buffers.kv_page_indices)
        packed = replace(spec, num_qo_heads=spec.num_kv_heads)
        self._kernel = LevelKernel(device, packed, page_size, "prefill_fa3", buffers=mine)

    def arrange(self, columns: LevelColumns) -> LevelColumns:
        """The chunks of a level as columns to plan, on the host.

        Graph mode: in pinned memory of the kernel's own, but for the page indices, which are put into chunk order
        where they are.
        """
        lengths = _lengths(columns, self._page_size)
        if self._host is None:
            rows = [end - begin for begin, end in pairwise(columns.qo_indptr.tolist())]
            tiles = self._num_tiles([n for n, length in zip(rows, lengths, strict=True) if length])
            self.num_chunks = self._rule.num_chunks(tiles, self._num_processors, max(lengths))
        cut = cut_level(columns, lengths, self._page_size, self._spec.group_size, self.num_chunks, self._rule)
        if self._host is None:
            return cut
        self._kernel.wait_for_plan()
        for mine, theirs in zip((*self._host[:2], self._host[3]), (*cut[:2], cut[3]), strict=True):
            mine.copy_(theirs)
        columns.kv_page_indices.copy_(cut.kv_page_indices)
        return self._host._replace(kv_page_indices=columns.kv_page_indices)

    def plan(self, columns: LevelColumns) -> None:
        """Plan fa3 for arranged columns."""
        self._kernel.plan(columns)

    def run(
        self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], output: LevelOutput, k_scale: float = 1.0
    ) -> LevelOutput:
        """As `LevelKernel.run`; where there are several chunks, the result is in new memory."""
        spec, rows, chunks = self._spec, len(q), self.num_chunks
        heads, group, dim = spec.num_kv_heads, spec.group_size, spec.head_dim
        packed_q = q.new_empty(chunks, rows, group, heads, dim)
        packed_q.copy_(q.view(rows, heads, group, dim).transpose(1, 2))
        packed = LevelOutput.empty(chunks * rows * group, self._kernel.spec)
        self._kernel.run(packed_q.view(-1, heads, dim), kv, packed, k_scale)
        out = packed.out.view(chunks, rows, group, heads, dim).permute(1, 0, 3, 2, 4)
        lse = packed.lse.view(chunks, rows, group, heads).permute(1, 0, 3, 2)
        if chunks == 1:
            output.out.view(rows, 1, heads, group, dim).copy_(out)
            output.lse.view(rows, 1, heads, group).copy_(lse)
            return output
        v, s = torch.empty(out.shape, dtype=out.dtype, device=out.device), lse.new_empty(lse.shape)
        v.copy_(out)
        s.copy_(lse)
        shape = rows, chunks, spec.num_qo_heads
        return LevelOutput(*self._device.ops.merge_states(v.view(*shape, dim), s.view(*shape)))

    def _num_tiles(self, rows: list[int]) -> int:
        """Tiles of segments of so many rows, over all KV heads."""
        tile = fa3_tile_rows(self._spec.head_dim)
        return max(1, sum(-(-n * self._spec.group_size // tile) for n in rows)) * self._spec.num_kv_heads

    def _fixed_columns(self, num_requests: int, page_indices: torch.Tensor) -> LevelBuffers:
        """Columns of that many requests on the device, and their pinned images."""
        sizes = (num_requests + 1, num_requests + 1, num_requests)
        pinned = [self._device.stream.pinned(size, torch.int32) for size in sizes]
        mine = [torch.zeros(size, dtype=torch.int32, device=self._spec.device) for size in sizes]
        self._host = LevelColumns(pinned[0], pinned[1], page_indices[:0], pinned[2])
        return LevelBuffers(mine[0], mine[1], page_indices, mine[2])


def cut_level(
    columns: LevelColumns, lengths: list[int], page_size: int, group_size: int, num_chunks: int, rule: ChunkRule
) -> LevelColumns:
    """A level as `num_chunks` times as many requests, chunk by chunk: those of the first chunk, of the second, ...

    A request has the packed rows of its segment in its chunk's block of rows, and an even share of its pages; or none
    of them, with a last_page_len of 0, which fa3 takes for the length.

    Args:
        columns: the level
        lengths: tokens of each segment
        page_size: tokens per page
        group_size: query heads per KV head, by which rows are multiplied
        num_chunks: the most that a segment is cut into
        rule: says how short a chunk may be
    """
    qo_indptr, page_indptr = columns.qo_indptr.tolist(), columns.kv_page_indptr.tolist()
    last = columns.kv_last_page_len.tolist()
    pieces = [max(1, min(num_chunks, length // rule.chunk_tokens)) for length in lengths]
    indptr, indices, lasts = [0], [], []
    for chunk in range(num_chunks):
        for segment, (begin, end) in enumerate(pairwise(page_indptr)):
            first, stop = (
                begin + (end - begin) * min(bound, pieces[segment]) // pieces[segment] for bound in (chunk, chunk + 1)
            )
            indices.append(columns.kv_page_indices[first:stop])
            indptr.append(indptr[-1] + stop - first)
            lasts.append(0 if first == stop else last[segment] if stop == end else page_size)
    rows = [end - begin for begin, end in pairwise(qo_indptr)] * num_chunks
    packed = accumulate((n * group_size for n in rows), initial=0)
    column = torch.tensor([*packed], dtype=torch.int32)
    return LevelColumns(
        column, torch.tensor(indptr, dtype=torch.int32), torch.cat(indices), torch.tensor(lasts, dtype=torch.int32)
    )


def _lengths(columns: LevelColumns, page_size: int) -> list[int]:
    """Tokens of each segment."""
    pages = (end - begin for begin, end in pairwise(columns.kv_page_indptr.tolist()))
    last = columns.kv_last_page_len.tolist()
    return [(n - 1) * page_size + tail if n else 0 for n, tail in zip(pages, last, strict=True)]
