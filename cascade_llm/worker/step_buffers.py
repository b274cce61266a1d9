"""The integers of a decode step in fixed device memory, brought there by one copy.

Two sets of pinned host buffers take turns: while the copy of one is under way, the next step is written into the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cascade_llm.attention.flashinfer.levels import LevelBuffers
from cascade_llm.device.stream import DeviceStream, Event

__all__ = ["HostBuffers", "StepBuffers"]

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
            begin += _aligned(length)
        return cls(*columns)


class HostBuffers:
    """A step as the host writes it, and the event after which it may be written again."""

    def __init__(
        self, stream: DeviceStream, max_rows: int, max_leaf_pages: int, shared_len: int, num_logprobs: int
    ) -> None:
        self.block = stream.pinned(block_len(max_rows, max_leaf_pages), torch.int32)
        self.columns = StepColumns.in_block(self.block, max_rows, max_leaf_pages)
        self.shared = stream.pinned(shared_len, torch.int32)
        """room for the columns of shared levels"""
        self.results = stream.pinned(2 * max_rows, torch.int64).view(2, max_rows)
        """[2, max_rows]: sampled tokens, and whether their logits were finite"""
        self.logprobs = stream.pinned(max_rows * num_logprobs, torch.float32).view(max_rows, num_logprobs)
        """[max_rows, num_logprobs], and below the ids that belong to them; see `GraphLogprobs`"""
        self.logprob_ids = stream.pinned(max_rows * num_logprobs, torch.int64).view(max_rows, num_logprobs)
        self.in_use: Event | None = None


class StepBuffers:
    """Device memory of the steps' columns and the host buffers that fill it."""

    def __init__(
        self, stream: DeviceStream, *, max_rows: int, max_leaf_pages: int, shared_len: int, num_logprobs: int
    ) -> None:
        """Set memory aside.

        Args:
            stream: that copies are queued on
            max_rows: rows of the largest step
            max_leaf_pages: page indices of the largest leaf
            shared_len: elements that the columns of all shared levels of one step need
            num_logprobs: log-probabilities that come back for each row
        """
        self._stream = stream
        self._block = torch.zeros(block_len(max_rows, max_leaf_pages), dtype=torch.int32, device=stream.device)
        self.columns = StepColumns.in_block(self._block, max_rows, max_leaf_pages)
        self._indices_begin = block_len(max_rows, 0)
        self._hosts = [
            HostBuffers(stream, max_rows, max_leaf_pages, shared_len, num_logprobs) for _ in range(NUM_HOSTS)
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


def block_len(max_rows: int, max_leaf_pages: int) -> int:
    """Elements of the block."""
    return sum(_aligned(length) for length in _lengths(max_rows, max_leaf_pages))


def _lengths(max_rows: int, max_leaf_pages: int) -> tuple[int, ...]:
    return (*(max_rows for _ in range(5)), max_rows + 1, max_rows, max_leaf_pages)


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
