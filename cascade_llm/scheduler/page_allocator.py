"""Which pages of the pool are free, and how many owners each of the others has."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable

__all__ = ["PageAllocator"]


class PageAllocator:
    """Page ids 0 to total_pages - 1 with reference counts.

    An owner is a sequence (one reference for each table that holds the page as its own) or the prefix cache (one
    reference for each page of the tree). A page is free when it has no owner. Pages are handed out in the order in
    which they were freed, so that a long prompt tends to get consecutive ids.
    """

    def __init__(self, total_pages: int) -> None:
        self.total_pages = total_pages
        self._free: deque[int] = deque(range(total_pages))
        self._num_owners = array("i", bytes(4 * total_pages))

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages, one owner each. The caller has made sure that there are so many."""
        assert count <= len(self._free), f"{count} pages wanted, {len(self._free)} free"
        pages = [self._free.popleft() for _ in range(count)]
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def add_owner(self, pages: Iterable[int]) -> None:
        """One more owner for each of these pages."""
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is free"
            self._num_owners[page] += 1

    def remove_owner(self, pages: Iterable[int]) -> None:
        """One owner less for each of these pages; without any a page is free at once.

        A step in flight may still touch it: later steps run after it on the same stream, so reuse is safe.
        """
        for page in pages:
            owners = self._num_owners[page] - 1
            assert owners >= 0, f"page {page} is free already"
            self._num_owners[page] = owners
            if owners == 0:
                self._free.append(page)

    def num_owners(self, page: int) -> int:
        """Owners of a page; 0 for a free one."""
        return self._num_owners[page]
