"""The leaf of an attention kind with a window, in fixed device memory, for graphs.

One kernel reads the leaf, with the window as its mask. Where sequences share pages, their windows in the leaf are
shorter by these, and differ; then what they cut is an *edge* of its own, in pages of one token (`window_cut`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cascade_llm.attention.backend import column_tensor
from cascade_llm.attention.flashinfer.levels import LevelBuffers, LevelColumns
from cascade_llm.attention.flashinfer.window_cut import cut_leaf
from cascade_llm.device.stream import DeviceStream
from cascade_llm.plan import CascadePlan, IntColumn
from cascade_llm.worker.step_buffers import NUM_HOSTS, Padding, aligned

__all__ = ["WindowBuffers", "WindowColumns"]

SPARE_PAGES = 4
"""Of a leaf, beside those that a window covers: pages that it cuts, and that it has left behind in a run of steps."""


class WindowColumns(NamedTuple):
    """A leaf as written."""

    leaf: LevelColumns
    """For its kernel's plan; the page indices go to the device by `WindowBuffers.send`."""
    num_pages: int
    """Page indices of the leaf."""
    follows: IntColumn | None
    """A column of the plan that is another object whenever page counts are others; None for padding."""


class WindowBuffers:
    """The columns of one kind, on the device and in the host buffers that fill them in turn."""

    def __init__(
        self, stream: DeviceStream, window_len: int, *, max_rows: int, max_model_len: int, padding: Padding
    ) -> None:
        """Set memory aside.

        Args:
            stream: that copies are queued on
            window_len: of the kind, in tokens
            max_rows: rows of the largest step
            max_model_len: tokens of the longest sequence
            padding: where rows that nobody asked for belong
        """
        self.window_len, self._stream, self._padding, self._max_rows = window_len, stream, padding, max_rows
        size = padding.page_size
        num_pages = min(-(-max_model_len // size), window_len // size + SPARE_PAGES)
        row_lengths = (max_rows, max_rows + 1, max_rows, max_rows + 1, max_rows)
        self._lengths = (*row_lengths, max_rows * size, max_rows * num_pages)
        length = sum(map(aligned, self._lengths))
        self._block = torch.zeros(length, dtype=torch.int32, device=stream.device)
        self._hosts = [stream.pinned(length, torch.int32) for _ in range(NUM_HOSTS)]

    def leaf_buffers(self, rows: int) -> LevelBuffers:
        """The leaf's columns of a graph with that many rows."""
        _, indptr, last_page_len, _, _, _, indices = self._cut(self._block)
        return LevelBuffers(self._row_indptr(rows), indptr[: rows + 1], indices, last_page_len[:rows])

    def edge_buffers(self, rows: int) -> LevelBuffers:
        """The edge's columns of a graph with that many rows: a segment per row."""
        _, _, _, indptr, last_page_len, indices, _ = self._cut(self._block)
        return LevelBuffers(self._row_indptr(rows), indptr[: rows + 1], indices, last_page_len[:rows])

    def edge_columns(self, rows: int) -> LevelColumns:
        """An edge of nothing, for its kernel's plan, which holds for all lengths."""
        row_indptr = torch.arange(rows + 1, dtype=torch.int32)
        nothing = torch.zeros(rows + 1, dtype=torch.int32)
        return LevelColumns(row_indptr, nothing, self._cut(self._block)[5][:0], nothing[:rows])

    def slots(self, rows: int) -> torch.Tensor:
        """[rows] where the rows of a graph write in the layers of the kind."""
        return self._cut(self._block)[0][:rows]

    def write(self, plan: CascadePlan | None, slots: IntColumn | None, rows: int, place: int) -> WindowColumns:
        """Write a decode plan's leaf into host buffers, padded to `rows`; without a plan, padding alone.

        Args:
            plan: of the kind
            slots: of its rows
            rows: of the graph
            place: which of the host buffers
        """
        own_slots, leaf_indptr, leaf_last, edge_indptr, edge_last, edge_indices, leaf_indices = self._cut(
            self._hosts[place]
        )
        count = num_pages = num_tokens = 0
        follows: IntColumn | None = None
        edge_indptr[0] = leaf_indptr[0] = 0
        if plan is not None and slots is not None:
            own_slots[: plan.num_rows] = column_tensor(slots)
            cut = cut_leaf(plan)
            leaf, count = cut.rest if cut else _columns_of(plan), plan.num_rows
            follows = plan.leaf.kv_last_page_len if cut else plan.leaf.kv_page_indptr
            num_pages = len(leaf.kv_page_indices)
            leaf_indptr[: count + 1], leaf_last[:count] = leaf.kv_page_indptr, leaf.kv_last_page_len
            leaf_indices[:num_pages] = leaf.kv_page_indices
            if cut is not None:
                num_tokens = len(cut.edge.kv_page_indices)
                edge_indptr[: count + 1], edge_last[:count] = cut.edge.kv_page_indptr, cut.edge.kv_last_page_len
                edge_indices[:num_tokens] = cut.edge.kv_page_indices
            else:
                edge_indptr[: count + 1] = edge_last[:count] = 0
        num_padding = rows - count
        own_slots[count:rows] = self._padding.page * self._padding.page_size
        leaf_indptr[count + 1 : rows + 1] = torch.arange(num_pages + 1, num_pages + num_padding + 1)
        leaf_last[count:rows], edge_last[count:rows] = 1, 0
        leaf_indices[num_pages : num_pages + num_padding] = self._padding.page
        edge_indptr[count + 1 : rows + 1] = num_tokens
        columns = LevelColumns(
            torch.arange(rows + 1, dtype=torch.int32), leaf_indptr[: rows + 1], leaf_indices[:0], leaf_last[:rows]
        )
        return WindowColumns(columns, num_pages + num_padding, follows)

    def send(self, columns: WindowColumns, place: int) -> None:
        """Queue the copy of host buffers to the device, as far as they are used."""
        used = sum(map(aligned, self._lengths[:-1])) + columns.num_pages
        self._stream.copy(self._block[:used], self._hosts[place][:used])

    def _row_indptr(self, rows: int) -> torch.Tensor:
        return torch.arange(rows + 1, dtype=torch.int32, device=self._stream.device)

    def _cut(self, block: torch.Tensor) -> list[torch.Tensor]:
        """The columns of a block: the rows' slots, of the leaf `indptr` and `last_page_len`, of the edge the same and
        its slots, and the leaf's page indices."""
        columns, begin = [], 0
        for length in self._lengths:
            columns.append(block[begin : begin + length])
            begin += aligned(length)
        return columns


def _columns_of(plan: CascadePlan) -> LevelColumns:
    leaf = plan.leaf
    columns = (leaf.qo_indptr, leaf.kv_page_indptr, leaf.kv_page_indices, leaf.kv_last_page_len)
    return LevelColumns(*map(column_tensor, columns))
