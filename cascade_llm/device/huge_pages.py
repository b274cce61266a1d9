"""Huge pages of 2 MiB for memory that every step reads from end to end.

With pages of 4 KiB a processor looks up an address twenty thousand times to read 80 MB of weights, and its own reading
ahead ends with each page. Memory is collected into huge pages after it has been filled (MADV_COLLAPSE, Linux 6.1), so
nothing else depends on where it came from; the kernel may refuse, and then it stays as it is.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["MemoryRange", "collect_into_huge_pages", "huge_pages_allowed"]

HUGE_PAGE_BYTES = 2 << 20
MADV_COLLAPSE = 25
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class MemoryRange(NamedTuple):
    """Bytes of this process."""

    address: int
    num_bytes: int


def huge_pages_allowed() -> bool:
    """Whether this is Linux, and its owner has not switched huge pages off."""
    try:
        return sys.platform == "linux" and "[never]" not in SETTING.read_text()
    except OSError:
        return False


def collect_into_huge_pages(ranges: Iterable[MemoryRange]) -> int:
    """Put memory into huge pages where that is allowed and the kernel does it.

    Args:
        ranges: anonymous memory that has been written; pages of which these are half or more are asked for

    Returns:
        the bytes of huge pages that there are now
    """
    if not huge_pages_allowed():
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    num_taken = 0
    for page in _pages_of(ranges):
        num_taken += madvise(page, HUGE_PAGE_BYTES, MADV_COLLAPSE) == 0
    return num_taken * HUGE_PAGE_BYTES


def _pages_of(ranges: Iterable[MemoryRange]) -> Iterator[int]:
    """The addresses of huge pages of which the ranges cover half or more."""
    covered: dict[int, int] = {}
    for address, num_bytes in ranges:
        end = address + num_bytes
        first = address - address % HUGE_PAGE_BYTES
        for page in range(first, end, HUGE_PAGE_BYTES):
            part = min(end, page + HUGE_PAGE_BYTES) - max(address, page)
            covered[page] = covered.get(page, 0) + part
    return (page for page, num_bytes in sorted(covered.items()) if num_bytes >= HUGE_PAGE_BYTES // 2)
