"""Segments of one level that are computed together: which rows, which keys, which mask.

A level's segments differ in rows and length. They are sorted and cut into batches; inside a batch all are padded to
the longest. A batch is closed when its padding would cost more than starting another one, or when its K/V would leave
the processor's cache. A long segment whose pages are consecutive is a batch of its own: it is read where it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cascade_llm.attention.columns import column_tensor
from cascade_llm.plan import CascadeLevel

__all__ = ["Blocking", "RowBlock", "Segment", "SegmentBatch", "read_segments", "split_into_batches"]


@dataclass(frozen=True, kw_only=True)
class Blocking:
    """How work is cut, in units that fit a processor's cache; the defaults were measured on a CPU."""

    scores_per_block: int = 1 << 20
    """Scores (over all heads) that are held at a time."""
    tokens_per_batch: int = 4096
    """Tokens of K/V that are gathered at a time, unless one segment is longer."""
    batch_overhead: int = 16384
    """What starting a batch costs, in scores of one head group: padding up to this much is cheaper."""
    token_overhead: int = 8
    """What gathering a token costs, in the same unit."""
    view_len: int = 512
    """From this length on, a segment in consecutive pages is read in place, alone."""


@dataclass(frozen=True, slots=True)
class Segment:
    """What batching needs to know of a segment that holds pages."""

    first_row: int
    num_rows: int
    first_page_entry: int
    kv_len: int
    first_slot: int
    is_consecutive: bool
    """Its pages follow each other in the pool, so its tokens are the slots from `first_slot` on."""


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
    real_rows: torch.Tensor | None
    """Which of the padded rows are real; None where all are."""
    slots: slice | torch.Tensor
    """[segments, kv_len] int64, padding repeats a segment's last token; a slice where one segment lies in one piece."""
    blocks: tuple[RowBlock, ...]

    @classmethod
    def build(
        cls,
        segments: Sequence[Segment],
        pages: torch.Tensor,
        page_size: int,
        *,
        causal: bool,
        window_len: int | None,
        rows_per_block: int,
    ) -> SegmentBatch:
        """Join segments of one level.

        Args:
            pages: the level's `kv_page_indices`, int64, on the device
            causal: whether a segment's rows are its last tokens and see no later ones
            window_len: how many tokens back a row may look; only with `causal`
        """
        first_row = torch.tensor([s.first_row for s in segments]).unsqueeze(1)
        num_rows = torch.tensor([s.num_rows for s in segments]).unsqueeze(1)
        kv_len = torch.tensor([s.kv_len for s in segments]).unsqueeze(1)
        row = torch.arange(max(s.num_rows for s in segments)).unsqueeze(0)
        limits = torch.minimum(kv_len - num_rows + row + 1, kv_len) if causal else kv_len.expand(-1, row.shape[1])
        return cls(
            num_segments=len(segments),
            num_rows=row.shape[1],
            kv_len=int(kv_len.max()),
            rows=_row_index(segments, (first_row + torch.minimum(row, num_rows - 1)).flatten(), pages.device),
            real_rows=None if bool((num_rows == row.shape[1]).all()) else _where(row < num_rows, pages.device),
            slots=_slots(segments, pages, page_size),
            blocks=tuple(
                _row_block(slice(start, min(start + rows_per_block, row.shape[1])), limits, window_len, pages.device)
                for start in range(0, row.shape[1], rows_per_block)
            ),
        )


def read_segments(level: CascadeLevel, page_size: int) -> list[Segment]:
    """The segments of a level that hold pages, in order."""
    pages, indptr = column_tensor(level.kv_page_indices), column_tensor(level.kv_page_indptr)
    if not len(pages):
        return []
    breaks = torch.zeros_like(pages)
    torch.cumsum(pages.diff() != 1, 0, out=breaks[1:])
    columns = (
        level.qo_indptr.tolist(),
        indptr.tolist(),
        level.kv_last_page_len.tolist(),
        pages[indptr[:-1].clamp(max=len(pages) - 1)].tolist(),
        breaks[indptr[:-1].clamp(max=len(pages) - 1)].tolist(),
        breaks[(indptr[1:] - 1).clamp(min=0)].tolist(),
    )
    qo_indptr, kv_indptr, last_page_len, first_page, first_break, last_break = columns
    return [
        Segment(
            first_row=qo_indptr[i],
            num_rows=qo_indptr[i + 1] - qo_indptr[i],
            first_page_entry=kv_indptr[i],
            kv_len=(kv_indptr[i + 1] - kv_indptr[i] - 1) * page_size + last_page_len[i],
            first_slot=first_page[i] * page_size,
            is_consecutive=first_break[i] == last_break[i],
        )
        for i in range(level.num_segments)
        if kv_indptr[i] < kv_indptr[i + 1] and qo_indptr[i] < qo_indptr[i + 1]
    ]


def split_into_batches(segments: Sequence[Segment], blocking: Blocking) -> list[list[Segment]]:
    """Segments that are worth computing together, each batch in the order of its rows."""
    batches: list[list[Segment]] = []
    rest: list[Segment] = []
    for segment in segments:
        if segment.is_consecutive and segment.kv_len >= blocking.view_len:
            batches.append([segment])
        else:
            rest.append(segment)
    batch: list[Segment] = []
    kv_len = cost = 0
    for segment in sorted(rest, key=lambda s: (s.num_rows, s.kv_len)):
        kv_len = max(kv_len, segment.kv_len)
        cost += segment.kv_len * (segment.num_rows + blocking.token_overhead)
        tokens = (len(batch) + 1) * kv_len
        padding = tokens * (segment.num_rows + blocking.token_overhead) - cost
        if not batch or padding > blocking.batch_overhead or tokens > blocking.tokens_per_batch:
            batch, kv_len, cost = [], segment.kv_len, segment.kv_len * (segment.num_rows + blocking.token_overhead)
            batches.append(batch)
        batch.append(segment)
    return [sorted(batch, key=lambda s: s.first_row) for batch in batches]


def _row_index(segments: Sequence[Segment], rows: torch.Tensor, device: torch.device) -> slice | torch.Tensor:
    """The rows as a slice where they follow each other without padding, else as an index tensor."""
    start, stop = segments[0].first_row, segments[-1].first_row + segments[-1].num_rows
    if sum(s.num_rows for s in segments) == len(rows) == stop - start:
        return slice(start, stop)
    return rows.to(device)


def _where(mask: torch.Tensor, device: torch.device) -> torch.Tensor:
    return mask.flatten().nonzero().squeeze(1).to(device)


def _slots(segments: Sequence[Segment], pages: torch.Tensor, page_size: int) -> slice | torch.Tensor:
    if len(segments) == 1 and segments[0].is_consecutive:
        return slice(segments[0].first_slot, segments[0].first_slot + segments[0].kv_len)
    device = pages.device
    kv_len = torch.tensor([s.kv_len for s in segments], device=device).unsqueeze(1)
    first_entry = torch.tensor([s.first_page_entry for s in segments], device=device).unsqueeze(1)
    token = torch.minimum(torch.arange(max(s.kv_len for s in segments), device=device), kv_len - 1)
    return pages[first_entry + token // page_size] * page_size + token % page_size


def _row_block(rows: slice, limits: torch.Tensor, window_len: int | None, device: torch.device) -> RowBlock:
    """The block of some rows, given how many of its segment's keys each row may read: `limits` [segments, rows]."""
    limit = limits[:, rows]
    first_limit, stop = int(limit.min()), int(limit.max())
    start = 0 if window_len is None else max(0, first_limit - window_len)
    masked_from = first_limit if window_len is None else start
    bias = None
    if masked_from < stop:
        key, limit = torch.arange(masked_from, stop, device=device), limit.to(device).unsqueeze(-1)
        hidden = key >= limit
        if window_len is not None:
            hidden |= key < limit - window_len
        bias = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)[:, None, :, None, :]
    return RowBlock(rows, slice(start, stop), bias)
