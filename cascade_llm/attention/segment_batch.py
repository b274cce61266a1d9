"""Segments of one level that are computed together: which rows, which keys, which mask.

A level's segments differ in rows and length. They are sorted and cut into batches; inside a batch all are padded to
the longest. A batch is closed when its padding would cost more than starting another one, or when its K/V would leave
the processor's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.plan import CascadeLevel

__all__ = ["Blocking", "RowBlock", "Segment", "SegmentBatch", "read_segments", "split_into_batches"]


@dataclass(frozen=True, kw_only=True)
class Blocking:
    """How work is cut so that it stays in a processor's caches; the defaults were measured on a CPU."""

    scores_per_block: int = 2 << 20
    """Scores (over all heads) that are held at a time."""
    gathered_bytes_per_batch: int = 6 << 20
    """K/V that are gathered at a time, unless one segment is longer."""
    batch_overhead: int = 32 << 10
    """What starting a batch costs, in rows x keys: padding up to this much is cheaper."""
    token_overhead: int = 8
    """What gathering a token costs, in the same unit."""


class Segment(NamedTuple):
    """What batching needs to know of a segment that holds pages."""

    first_row: int
    num_rows: int
    first_page_entry: int
    kv_len: int
    window_len: int | None = None
    """How many tokens back a row may look, its own counted; only where it is masked."""


@dataclass(frozen=True, slots=True)
class RowBlock:
    """Some rows of every segment of a batch, and the keys that any of them may read."""

    rows: slice
    keys: slice
    bias: torch.Tensor | None
    """[segments, 1, rows, 1, columns] float32, 0 or -inf, on the last columns of `keys`; None hides nothing."""


@dataclass(frozen=True, slots=True)
class SegmentBatch:
    """Segments padded to `num_rows` rows and `kv_len` keys each."""

    num_segments: int
    num_rows: int
    kv_len: int
    rows: slice | torch.Tensor
    """The step's rows, segment by segment; padding repeats a segment's last row."""
    real: slice | torch.Tensor
    """Which of these are not padding."""
    real_rows: slice | torch.Tensor
    """The step's rows without padding."""
    slots: torch.Tensor
    """[segments, kv_len] int64; padding repeats a segment's last token, so that it cannot bring in what lies there."""
    blocks: tuple[RowBlock, ...]

    @classmethod
    def build(
        cls,
        segments: Sequence[Segment],
        pages: torch.Tensor,
        page_size: int,
        *,
        causal: bool,
        max_rows_per_block: int,
    ) -> SegmentBatch:
        """Join segments of one level.

        Args:
            pages: [page entries], the level's `kv_page_indices`, int64, on the device
            causal: whether a segment's rows are its last tokens and see no later ones
        """
        num_rows, kv_len = (
            torch.tensor(x).unsqueeze(1) for x in zip(*((s.num_rows, s.kv_len) for s in segments), strict=True)
        )
        max_rows = int(num_rows.max())
        row = torch.arange(max_rows).unsqueeze(0)
        limits = torch.minimum(kv_len - num_rows + row + 1, kv_len) if causal else kv_len.expand(-1, max_rows)
        windows = [s.window_len for s in segments if s.window_len is not None]
        window_lens = torch.tensor(windows).unsqueeze(1) if windows else None
        rows_per_block = -(-max_rows // -(-max_rows // max_rows_per_block))
        rows, real, real_rows = _row_indices(segments, num_rows, row, pages.device)
        return cls(
            num_segments=len(segments),
            num_rows=max_rows,
            kv_len=int(kv_len.max()),
            rows=rows,
            real=real,
            real_rows=real_rows,
            slots=_slots(segments, pages, page_size),
            blocks=tuple(
                _row_block(slice(start, min(start + rows_per_block, max_rows)), limits, window_lens, pages.device)
                for start in range(0, max_rows, rows_per_block)
            ),
        )


def read_segments(level: CascadeLevel, page_size: int, window_lens: Sequence[int] | None = None) -> list[Segment]:
    """The segments of a level that hold pages, in order; `window_lens`: one for each segment of the level."""
    qo_indptr, kv_indptr = level.qo_indptr.tolist(), level.kv_page_indptr.tolist()
    windows = [None] * level.num_segments if window_lens is None else window_lens
    return [
        Segment(row, next_row - row, entry, (next_entry - entry - 1) * page_size + last_page_len, window_len)
        for (row, next_row), (entry, next_entry), last_page_len, window_len in zip(
            pairwise(qo_indptr), pairwise(kv_indptr), level.kv_last_page_len, windows, strict=True
        )
        if entry < next_entry and row < next_row
    ]


def split_into_batches(segments: Sequence[Segment], blocking: Blocking, spec: AttentionSpec) -> list[list[Segment]]:
    """Segments that are worth computing together, each batch in the order of its rows."""
    max_tokens = blocking.gathered_bytes_per_batch // (2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize)
    batches: list[list[Segment]] = []
    kv_len = useful = 0
    for segment in sorted(segments, key=lambda s: (s.num_rows, s.kv_len)):
        token_cost = segment.num_rows + blocking.token_overhead
        kv_len, useful = max(kv_len, segment.kv_len), useful + segment.kv_len * token_cost
        num_tokens = (len(batches[-1]) + 1) * kv_len if batches else 0
        padding = num_tokens * token_cost - useful
        if not batches or num_tokens > max_tokens or padding > blocking.batch_overhead:
            batches.append([])
            kv_len, useful = segment.kv_len, segment.kv_len * token_cost
        batches[-1].append(segment)
    return [sorted(batch, key=lambda s: s.first_row) for batch in batches]


def _row_indices(
    segments: Sequence[Segment], num_rows: torch.Tensor, row: torch.Tensor, device: torch.device
) -> tuple[slice | torch.Tensor, slice | torch.Tensor, slice | torch.Tensor]:
    """`rows`, `real` and `real_rows` of a batch: slices where its rows follow each other without padding."""
    start, stop = segments[0].first_row, segments[-1].first_row + segments[-1].num_rows
    if stop - start == int(num_rows.sum()) == len(segments) * row.shape[1]:
        return slice(start, stop), slice(None), slice(start, stop)
    first_row = torch.tensor([s.first_row for s in segments]).unsqueeze(1)
    rows = (first_row + torch.minimum(row, num_rows - 1)).flatten()
    real = (row < num_rows).flatten().nonzero().squeeze(1)
    return rows.to(device), real.to(device), rows[real].to(device)


def _slots(segments: Sequence[Segment], pages: torch.Tensor, page_size: int) -> torch.Tensor:
    device = pages.device
    kv_len = torch.tensor([s.kv_len for s in segments], device=device).unsqueeze(1)
    first_entry = torch.tensor([s.first_page_entry for s in segments], device=device).unsqueeze(1)
    token = torch.minimum(torch.arange(max(s.kv_len for s in segments), device=device), kv_len - 1)
    return pages[first_entry + token // page_size] * page_size + token % page_size


def _row_block(rows: slice, limits: torch.Tensor, window_lens: torch.Tensor | None, device: torch.device) -> RowBlock:
    """The block of some rows, given how many of its segment's keys each row may read: up to `limits` [segments, rows],
    and of these the last `window_lens` [segments, 1]."""
    limit = limits[:, rows]
    masked_from, start, stop = int(limit.min()), 0, int(limit.max())
    first_keys = None
    if window_lens is not None:
        first_keys = limit - window_lens
        masked_from = start = max(0, int(first_keys.min()))
    bias = None
    if masked_from < stop:
        key = torch.arange(masked_from, stop, device=device)
        hidden = key >= limit.to(device).unsqueeze(-1)
        if first_keys is not None:
            hidden |= key < first_keys.to(device).unsqueeze(-1)
        bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)[:, None, :, None, :]
    return RowBlock(rows, slice(start, stop), bias)
