"""Memory whose parts are given out again as soon as no tensor uses them, at addresses that stay."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Arena"]

ALIGNMENT = 64


class Arena:
    """Blocks of memory on the host, each with at most one living tensor.

    A block lives as long as the arena does: whoever keeps the address of a tensor may use it after the tensor is gone,
    until the block has been given to another.
    """

    def __init__(self) -> None:
        self._blocks: list[tuple[torch.Tensor, StorageWeakRef | None]] = []

    @property
    def num_bytes(self) -> int:
        """Of all blocks."""
        return sum(block.nbytes for block, _ in self._blocks)

    def empty(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor without values, in a block that no living tensor has; strides in elements, as torch counts them."""
        extent = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        needed = max(extent * dtype.itemsize, 1)
        place = self._free_block(needed)
        block, _ = self._blocks[place]
        memory = (ctypes.c_char * block.nbytes).from_address(block.data_ptr())
        values = torch.frombuffer(memory, dtype=torch.uint8)  # a storage of its own over the same bytes
        self._blocks[place] = block, StorageWeakRef(values.untyped_storage())  # type: ignore[no-untyped-call]
        whole = values[: needed // dtype.itemsize * dtype.itemsize].view(dtype)
        return torch.as_strided(whole, tuple(size), tuple(stride))

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory of the arena, as a tensor that keeps no block; other tensors as they are."""
        if tensor.layout != torch.strided:
            return tensor
        address = tensor.untyped_storage().data_ptr()
        block = next((block for block, _ in self._blocks if block.data_ptr() == address), None)
        if block is None:
            return tensor
        values = block[: block.nbytes // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
        return torch.as_strided(values, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _free_block(self, needed: int) -> int:
        """The smallest that is free and large enough, but not more than twice as large; else a new one."""
        fitting = [
            (block.nbytes, place)
            for place, (block, user) in enumerate(self._blocks)
            if needed <= block.nbytes <= 2 * needed + ALIGNMENT and (user is None or user.expired())  # type: ignore[no-untyped-call]
        ]
        if fitting:
            return min(fitting)[1]
        rounded = -(-needed // ALIGNMENT) * ALIGNMENT
        self._blocks.append((torch.empty(rounded, dtype=torch.uint8), None))
        return len(self._blocks) - 1
