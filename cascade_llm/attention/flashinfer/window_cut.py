"""A leaf of an attention kind with a window, cut in two that need no mask of their own.

FlashInfer's window is one number for all segments of a kernel. Where a sequence shares pages, the window that its rows
have in the leaf is shorter by these, so it is another from segment to segment. Then the pages that the window cuts are
taken off the leaf, token by token, row by row, and nothing of the rest is hidden but by the causal mask:

    pages of a leaf, a row      |..xx|xxxx|xxxx|xx    the window hides two tokens
    edge, in pages of a token      xx
    rest                              xxxx|xxxx|xx
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cascade_llm.attention.backend import column_tensor
from cascade_llm.attention.flashinfer.levels import LevelColumns
from cascade_llm.plan import CascadePlan

__all__ = ["CutLeaf", "cut_leaf"]


class CutLeaf(NamedTuple):
    """Two levels over the same rows, all columns on the host."""

    rest: LevelColumns
    """The leaf, without the pages that are cut for any row of their sequence."""
    edge: LevelColumns
    """What of these pages each row reads, in pages of one token: a segment per row that reads any, else one per
    sequence."""


def cut_leaf(plan: CascadePlan) -> CutLeaf | None:
    """Cut the leaf of a plan with a window; None where one window is right for all of its segments."""
    leaf, size = plan.leaf, plan.page_size
    if plan.window_len is None or len(plan.levels) == 1:
        return None
    first_entries, pages = _long(leaf.kv_page_indptr), _long(leaf.kv_page_indices)
    row_starts, num_pages = _long(leaf.qo_indptr), first_entries.diff()
    num_rows, kv_len = row_starts.diff(), (num_pages - 1) * size + _long(leaf.kv_last_page_len)
    shared_len = _shared_lens(plan, row_starts[:-1])
    window_len = plan.window_len - shared_len
    num_cut = (kv_len - window_len + size - 1).clamp(min=0) // size * (shared_len > 0)
    if not num_cut.any():
        return None
    sequence = torch.arange(len(num_rows)).repeat_interleave(num_pages)
    kept = torch.arange(len(pages)) - first_entries[sequence] >= num_cut[sequence]
    rest = LevelColumns(
        column_tensor(leaf.qo_indptr),
        _indptr(num_pages - num_cut),
        pages[kept].int(),
        column_tensor(leaf.kv_last_page_len),
    )
    # the segments of the edge: the sequence of each, its row in that sequence, and the tokens of the leaf that it reads
    is_cut = num_cut > 0
    num_segments = torch.where(is_cut, num_rows, 1)
    sequence = torch.arange(len(num_rows)).repeat_interleave(num_segments)
    row = torch.arange(len(sequence)) - (num_segments.cumsum(0) - num_segments)[sequence]
    begin = (kv_len - num_rows + 1 - window_len)[sequence] + row
    length = (num_cut[sequence] * size - begin.clamp(min=0)) * is_cut[sequence]
    segment = torch.arange(len(sequence)).repeat_interleave(length)
    token = torch.arange(len(segment)) - (length.cumsum(0) - length)[segment] + begin.clamp(min=0)[segment]
    slots = pages[first_entries[:-1][sequence[segment]] + token // size] * size + token % size
    edge = LevelColumns(
        _indptr(torch.where(is_cut[sequence], 1, num_rows[sequence])), _indptr(length), slots.int(), (length > 0).int()
    )
    return CutLeaf(rest, edge)


def _shared_lens(plan: CascadePlan, first_rows: torch.Tensor) -> torch.Tensor:
    """For the sequences that begin at these rows, tokens of the shared segments above them: [sequences] int64."""
    shared_len = torch.zeros_like(first_rows)
    for level in plan.shared_levels:
        lens = _long(level.kv_page_indptr).diff() * plan.page_size
        shared_len += lens[torch.searchsorted(_long(level.qo_indptr)[1:], first_rows, right=True)]
    return shared_len


def _long(column: memoryview) -> torch.Tensor:
    return column_tensor(column).long()


def _indptr(lens: torch.Tensor) -> torch.Tensor:
    return torch.cat((torch.zeros(1, dtype=torch.int64), lens.cumsum(0))).int()
