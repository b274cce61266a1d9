"""The pages of one pool: which are free, and how many own the others."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

__all__ = ["PageAllocator"]


class PageAllocator:
    """Page ids 0 to total_pages - 1 with reference counts.

    An owner is a sequence (one reference for each table that holds the page as its own) or the prefix cache (one
    reference for each page of the tree). A page is free when it has no owner. Pages are handed out in the order in
    which they were freed, so that a long prompt tends to get consecutive ids.

    Eight bytes a page, however many are free: owners, and a ring of free ids.
    """

    def __init__(self, total_pages: int) -> None:
        self.total_pages = total_pages
        self.num_free = total_pages
        """Pages without an owner."""
        self._ring = array("i", range(total_pages))
        self._first_free = 0
        self._num_owners = array("i", bytes(4 * total_pages))

    def allocate(self, count: int) -> array[int]:
        """Take `count` free pages, one owner each. The caller has made sure that there are so many."""
        assert count <= self.num_free, f"{count} pages wanted, {self.num_free} free"
        stop = self._first_free + count
        pages = self._ring[self._first_free : stop]
        if stop > self.total_pages:
            pages.extend(self._ring[: stop - self.total_pages])
        self._first_free = stop % self.total_pages
        self.num_free -= count
        for page in pages:
            self._num_owners[page] = 1
        return pages

    def add_owner(self, pages: Iterable[int]) -> None:
        """One more owner for each of these pages."""
        for page in pages:
            assert self._num_owners[page] > 0, f"page {page} is free"
            self._num_owners[page] += 1

    def remove_owner(self, pages: Iterable[int]) -> array[int]:
        """One owner less for each of these pages; without any a page is free at once. Returns those that are free now.

        A step in flight may still touch it: later steps run after it on the same stream, so reuse is safe.
        """
        num_owners, freed = self._num_owners, array("i")
        for page in pages:
            owners = num_owners[page] - 1
            assert owners >= 0, f"page {page} is free already"
            num_owners[page] = owners
            if owners == 0:
                freed.append(page)
        self._append_free(freed)
        return freed

    def num_owners(self, page: int) -> int:
        """Owners of a page; 0 for a free one."""
        return self._num_owners[page]

    def shared(self, pages: array[int], first: int) -> list[int]:
        """Which of `pages`, from index `first` on, have several owners."""
        num_owners = self._num_owners
        return [index for index in range(first, len(pages)) if num_owners[pages[index]] > 1]

    def _append_free(self, pages: array[int]) -> None:
        """Put pages at the end of the ring, which has room: it holds every page."""
        start = (self._first_free + self.num_free) % self.total_pages
        until_wrap = self.total_pages - start
        self._ring[start : start + len(pages)] = pages[:until_wrap]
        if len(pages) > until_wrap:
            self._ring[: len(pages) - until_wrap] = pages[until_wrap:]
        self.num_free += len(pages)
