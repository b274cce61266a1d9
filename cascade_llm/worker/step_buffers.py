"""The integers of a decode step in fixed device memory, brought there by one copy.

Two sets of pinned host buffers take turns: while the copy of one is under way, the next step is written into the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from cascade_llm.attention.backend import column_tensor
from cascade_llm.attention.flashinfer.levels import LevelBuffers, LevelColumns
from cascade_llm.device.stream import DeviceStream, Event
from cascade_llm.plan import CascadeLevel, StepPlan
from cascade_llm.sampling.lanes import NO_TOKEN
from cascade_llm.worker.graph_shapes import needs_padding_segment

__all__ = ["NUM_HOSTS", "HostBuffers", "Padding", "StepBuffers", "aligned"]

ALIGNMENT = 4
"""int32 elements: kernels read 16 bytes at a time"""
NUM_HOSTS = 2


@dataclass(frozen=True, slots=True)
class StepColumns:
    """The columns of a step, in one block of memory; `max_rows` each unless said otherwise."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    token_lanes: torch.Tensor
    """the lane that a row's token comes from, `token_ids` then being -1; else `LaneState.no_lane`"""
    sample_lanes: torch.Tensor
    """the lane that a row's sampled token goes to; the padding lane for a row that is not sampled"""
    leaf_indptr: torch.Tensor
    """[max_rows + 1]"""
    leaf_last_page_len: torch.Tensor
    leaf_indices: torch.Tensor
    """[max_leaf_pages]"""

    @classmethod
    def in_block(cls, block: torch.Tensor, max_rows: int, max_leaf_pages: int) -> StepColumns:
        """Cut a block [block_len], int32, into columns."""
        columns, begin = [], 0
        for length in _lengths(max_rows, max_leaf_pages):
            columns.append(block[begin : begin + length])
            begin += aligned(length)
        return cls(*columns)


class Padding(NamedTuple):
    """Where the rows that nobody asked for belong."""

    page: int
    """of no sequence: they write to it and read it"""
    page_size: int
    lane: int
    """of no sequence: their tokens go there"""
    no_lane: int
    """see `LaneState.no_lane`"""


class HostBuffers:
    """A step as the host writes it, and the event after which it may be written again."""

    def __init__(
        self,
        stream: DeviceStream,
        max_rows: int,
        max_leaf_pages: int,
        shared_len: int,
        num_logprobs: int,
        padding: Padding,
        place: int,
    ) -> None:
        self.place = place
        """which of the host buffers these are"""
        self.block = stream.pinned(block_len(max_rows, max_leaf_pages), torch.int32)
        self.columns = StepColumns.in_block(self.block, max_rows, max_leaf_pages)
        self._padding = padding
        self._shared, self._shared_used = stream.pinned(shared_len, torch.int32), 0
        """room for the columns of shared levels"""
        self.results = stream.pinned(2 * max_rows, torch.int64).view(2, max_rows)
        """[2, max_rows]: sampled tokens, and whether their logits were finite"""
        self.logprobs = stream.pinned(max_rows * num_logprobs, torch.float32).view(max_rows, num_logprobs)
        """[max_rows, num_logprobs], and below the ids that belong to them; see `sampling.logprobs.report`"""
        self.logprob_ids = stream.pinned(max_rows * num_logprobs, torch.int64).view(max_rows, num_logprobs)
        self.in_use: Event | None = None

    def write_step(self, plan: StepPlan, rows: int) -> int:
        """Write a step's columns, padded to `rows`; returns how many page indices the leaf has."""
        columns, count, leaf = self.columns, plan.num_rows, plan.cascade.leaf
        columns.token_ids[:count] = column_tensor(plan.token_ids)
        columns.positions[:count] = column_tensor(plan.positions)
        columns.slots[:count] = column_tensor(plan.slots)
        columns.token_lanes[:count] = self._padding.no_lane
        lane_rows = column_tensor(plan.lane_rows).long()
        columns.token_ids[lane_rows] = NO_TOKEN
        columns.token_lanes[lane_rows] = column_tensor(plan.lane_row_lanes)
        columns.sample_lanes[:count] = self._padding.lane
        columns.sample_lanes[column_tensor(plan.sample_rows).long()] = column_tensor(plan.sample_lanes)
        num_pages = len(leaf.kv_page_indices)
        columns.leaf_indptr[: count + 1] = column_tensor(leaf.kv_page_indptr)
        columns.leaf_last_page_len[:count] = column_tensor(leaf.kv_last_page_len)
        columns.leaf_indices[:num_pages] = column_tensor(leaf.kv_page_indices)
        self.write_padding(count, rows, first_leaf_page=num_pages)
        return num_pages + rows - count

    def write_padding(self, first: int, rows: int, *, first_leaf_page: int) -> None:
        """Rows that nobody asked for: token 0 on the padding page, each with that one page and one token."""
        columns, count, padding = self.columns, rows - first, self._padding
        self._shared_used = 0  # shared levels are written behind the rows, into the whole room
        columns.token_ids[first:rows] = 0
        columns.positions[first:rows] = 0
        columns.slots[first:rows] = padding.page * padding.page_size
        columns.token_lanes[first:rows] = padding.no_lane
        columns.sample_lanes[first:rows] = padding.lane
        columns.leaf_indptr[0] = 0
        columns.leaf_indptr[first + 1 : rows + 1] = torch.arange(first_leaf_page + 1, first_leaf_page + count + 1)
        columns.leaf_last_page_len[first:rows] = 1
        columns.leaf_indices[first_leaf_page : first_leaf_page + count] = padding.page

    def leaf_columns(self, rows: int) -> LevelColumns:
        """The leaf as written, for its kernel's plan; the page indices go to the device with the step's columns."""
        columns = self.columns
        return LevelColumns(
            torch.arange(rows + 1, dtype=torch.int32),
            columns.leaf_indptr[: rows + 1],
            columns.leaf_indices[:0],
            columns.leaf_last_page_len[:rows],
        )

    def shared_columns(self, level: CascadeLevel, rows: int, capacity: int) -> LevelColumns:
        """Write a shared level padded to its capacity: padding rows in an empty segment, the rest without rows."""
        own, num_pages = level.num_segments, len(level.kv_page_indices)
        qo_indptr, kv_page_indptr = level.qo_indptr.tolist(), level.kv_page_indptr.tolist()
        if not needs_padding_segment(level, level.num_rows, rows):
            qo_indptr[-1] = rows  # the last segment is empty, or there are no padding rows
        return LevelColumns(
            self._put(qo_indptr + [rows] * (capacity - own)),
            self._put(kv_page_indptr + [num_pages] * (capacity - own)),
            self._put(level.kv_page_indices.tolist()),
            self._put(level.kv_last_page_len.tolist() + [0] * (capacity - own)),
        )

    def stand_in_columns(self, rows: int, capacity: int, page: int) -> LevelColumns:
        """Write a shared level to capture with: all rows over the padding page of the level's kind."""
        return LevelColumns(
            self._put([0] + [rows] * capacity),
            self._put([0] + [1] * capacity),
            self._put([page]),
            self._put([self._padding.page_size] + [0] * (capacity - 1)),
        )

    def _put(self, values: list[int]) -> torch.Tensor:
        """The values [len(values)], int32, in the next free piece of pinned memory."""
        piece = self._shared[self._shared_used : self._shared_used + len(values)]
        piece.copy_(torch.tensor(values, dtype=torch.int32))
        self._shared_used += len(values)
        return piece


class StepBuffers:
    """Device memory of the steps' columns and the host buffers that fill it."""

    def __init__(
        self,
        stream: DeviceStream,
        *,
        max_rows: int,
        max_leaf_pages: int,
        shared_len: int,
        num_logprobs: int,
        padding: Padding,
    ) -> None:
        """Set memory aside.

        Args:
            stream: that copies are queued on
            max_rows: rows of the largest step
            max_leaf_pages: page indices of the largest leaf
            shared_len: elements that the columns of all shared levels of one step need
            num_logprobs: log-probabilities that come back for each row
            padding: where rows that nobody asked for belong
        """
        self._stream = stream
        self._block = torch.zeros(block_len(max_rows, max_leaf_pages), dtype=torch.int32, device=stream.device)
        self.columns = StepColumns.in_block(self._block, max_rows, max_leaf_pages)
        self._indices_begin = block_len(max_rows, 0)
        self._hosts = [
            HostBuffers(stream, max_rows, max_leaf_pages, shared_len, num_logprobs, padding, place)
            for place in range(NUM_HOSTS)
        ]
        self._next = 0

    def leaf_buffers(self, rows: int) -> LevelBuffers:
        """The leaf's columns of a graph with that many rows; FlashInfer's decode wrapper makes `qo_indptr` itself."""
        columns = self.columns
        qo_indptr = torch.arange(rows + 1, dtype=torch.int32, device=self._stream.device)
        return LevelBuffers(
            qo_indptr, columns.leaf_indptr[: rows + 1], columns.leaf_indices, columns.leaf_last_page_len[:rows]
        )

    def take_host(self) -> HostBuffers:
        """The host buffers that were used longest ago, once the device is done with them.

        The results of the step before lie in the other, and may not have been read yet: one step takes one set.
        """
        host = self.next_host()
        self._next = (self._next + 1) % NUM_HOSTS
        return host

    def next_host(self) -> HostBuffers:
        """The host buffers that will be taken next, for work that is no step."""
        host = self._hosts[self._next]
        if host.in_use is not None:
            host.in_use.synchronize()
        return host

    def send(self, host: HostBuffers, num_leaf_pages: int) -> None:
        """Queue the copy of host buffers to the device, as far as they are used."""
        used = self._indices_begin + num_leaf_pages
        self._stream.copy(self._block[:used], host.block[:used])

    def send_padding(self, rows: int) -> None:
        """Queue the columns of a step that nobody asked for, between two steps: what graphs run on before a capture."""
        host = self.next_host()
        host.write_padding(0, rows, first_leaf_page=0)
        self.send(host, rows)
        host.in_use = self._stream.record_event()


def block_len(max_rows: int, max_leaf_pages: int) -> int:
    """Elements of the block."""
    return sum(aligned(length) for length in _lengths(max_rows, max_leaf_pages))


def _lengths(max_rows: int, max_leaf_pages: int) -> tuple[int, ...]:
    return (*(max_rows for _ in range(5)), max_rows + 1, max_rows, max_leaf_pages)


def aligned(length: int) -> int:
    """A length of int32 elements with which what comes behind it is aligned."""
    return -(-length // ALIGNMENT) * ALIGNMENT
