"""Exchanges between CPU ranks of one machine, through memory that they share.

Each rank has two slots. In an exchange it puts its numbers into one of them, tells so, waits until those are there that
it reads, and reads them where they lie. The next exchange takes the other slot, and the one after it the first again:
it begins when all have begun the one before, so nobody reads that slot any more. Longer tensors go in parts.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cascade_llm.device.exchange import Exchange
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import EXCHANGE
from cascade_llm.errors import BackendError

__all__ = ["MemoryExchange"]

LINE_BYTES, LINES_BYTES = 64, 4096
"""Of one rank's count, and of all at the beginning of the memory; see exchange.c."""
SLOT_BYTES = 1 << 18
"""Small enough that what one rank writes is still in a cache when the others read it."""
POLL_S = 50e-6
"""Between two looks, where there is no native code to sleep by."""


class MemoryExchange(Exchange):
    """See `Exchange`."""

    def __init__(self, index: int, count: int, path: Path, *, compiled: bool = True) -> None:
        """Meet the others.

        Args:
            index, count: which rank this is, of how many
            path: of a file that the first rank to come makes, and that is gone when all are there
            compiled: whether native code waits, where there is some; all ranks must say the same

        Raises:
            RuntimeError: another rank has left
            OSError: there is no room for the memory
        """
        self._index, self._count = index, count
        self._memory = _shared_bytes(path, LINES_BYTES + 2 * count * SLOT_BYTES)
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._lines = self._memory.data_ptr()
        self._tell, self._wait = (_compiled_calls() if compiled else None) or _polling_calls(self._memory)
        self._begun = 0
        self.least(torch.zeros(1))
        if index == 0:
            path.unlink()

    def sum(self, x: torch.Tensor) -> None:
        """See `Exchange`."""
        for part in self._parts(x):
            first, second, *others = self._put(part).unbind()
            self._wait_for(self._count)
            torch.add(first, second, out=part)
            for other in others:
                part.add_(other)

    def least(self, x: torch.Tensor) -> None:
        """See `Exchange`."""
        for part in self._parts(x):
            slots = self._put(part)
            self._wait_for(self._count)
            torch.amin(slots, 0, out=part)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See `Exchange`."""
        found = [torch.empty_like(x) for _ in range(self._count)] if self._index == 0 else []
        for number, part in enumerate(parts := self._parts(x)):
            slots = self._put(part)
            if found:
                self._wait_for(self._count)
                for whole, slot in zip(found, slots, strict=True):
                    whole.view(-1)[number * len(parts[0]) :][: len(part)].copy_(slot)
        return found

    def broadcast(self, x: torch.Tensor) -> None:
        """See `Exchange`."""
        for part in self._parts(x):
            slots = self._put(part)
            if self._index != 0:
                self._wait_for(1)
                part.copy_(slots[0])

    def close(self) -> None:
        """See `Exchange`; whoever waits for this rank hears of it."""
        self._tell(self._lines + LINE_BYTES * self._index, 2 * self._begun % 2**32 + 1)

    def _parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        flat, most = x.view(-1), SLOT_BYTES // x.element_size()
        return [flat[begin : begin + most] for begin in range(0, max(1, len(flat)), most)]

    def _put(self, part: torch.Tensor) -> torch.Tensor:
        """Begin an exchange; returns the slots of all ranks [count, numbers of the part], of which this one's is
        written."""
        self._wait_for(self._count)
        self._begun += 1
        slots = self._slots(part.dtype)[self._begun % 2, :, : len(part)]
        slots[self._index].copy_(part)
        self._tell(self._lines + LINE_BYTES * self._index, 2 * self._begun % 2**32)
        return slots

    def _wait_for(self, count: int) -> None:
        """Until so many ranks, the first ones, have begun this exchange."""
        if self._wait(self._lines, count, 2 * self._begun % 2**32):
            raise RuntimeError("it has left")

    def _slots(self, dtype: torch.dtype) -> torch.Tensor:
        """[2, count, numbers of a slot]"""
        if dtype not in self._typed:
            with torch.inference_mode(False):  # written in that mode and outside
                self._typed[dtype] = self._memory[LINES_BYTES:].view(dtype).view(2, self._count, -1)
        return self._typed[dtype]


def _shared_bytes(path: Path, num_bytes: int) -> torch.Tensor:
    """A file's bytes, mapped; zero where nobody has written."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, num_bytes)  # a full file system is an error here, not a signal later
        else:
            os.ftruncate(file, num_bytes)
        return torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8)
    finally:
        os.close(file)


Calls = tuple[Callable[[int, int], None], Callable[[int, int, int], int]]
"""`rank_tell` and `rank_wait` of exchange.c, lines given by their addresses."""


@functools.cache
def _compiled_calls() -> Calls | None:
    """None where there is no native code."""
    try:
        functions = native_functions(EXCHANGE)
    except BackendError:
        return None
    tell, wait = functions["rank_tell"], functions["rank_wait"]
    tell.declare(ctypes.c_void_p, ctypes.c_uint32)
    wait.declare(ctypes.c_void_p, ctypes.c_long, ctypes.c_uint32, returns=ctypes.c_int)
    return tell, wait


def _polling_calls(memory: torch.Tensor) -> Calls:
    """Their slow twins."""
    words = memory[:LINES_BYTES].view(torch.int32).numpy().view("uint32")
    base = memory.data_ptr()

    def tell(line: int, begun: int) -> None:
        words[(line - base) // 4] = begun

    def wait(lines: int, count: int, begun: int) -> int:
        for rank in range(count):
            while (int(words[rank * LINE_BYTES // 4]) - begun) % 2**32 >= 2**31:
                if words[rank * LINE_BYTES // 4] & 1:
                    return 1
                time.sleep(POLL_S)
        return 0

    return tell, wait
