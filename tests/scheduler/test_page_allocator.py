"""Reference counts of pages: a page is free exactly when nobody owns it."""

from __future__ import annotations

import random

import pytest

from cascade_llm.scheduler.pages import PageAllocator


def test_pages_are_handed_out_in_the_order_in_which_they_were_freed() -> None:
    pages = PageAllocator(4)
    assert list(pages.allocate(3)) == [0, 1, 2]
    pages.remove_owner([2, 0])
    assert pages.num_free == 3
    assert list(pages.allocate(3)) == [3, 2, 0]


def test_a_page_is_free_when_its_last_owner_goes() -> None:
    pages = PageAllocator(2)
    (page,) = pages.allocate(1)
    pages.add_owner([page, page])
    for owners in (2, 1):
        pages.remove_owner([page])
        assert (pages.num_owners(page), pages.num_free) == (owners, 1)
    pages.remove_owner([page])
    assert (pages.num_owners(page), pages.num_free) == (0, 2)


def test_misuse_is_noticed() -> None:
    pages = PageAllocator(2)
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        pages.allocate(3)
    with pytest.raises(AssertionError, match="page 1 is free"):
        pages.add_owner([1])
    with pytest.raises(AssertionError, match="page 1 is free already"):
        pages.remove_owner([1])


def test_counts_equal_a_plain_list_of_owners() -> None:
    rng, pages, owned = random.Random(0), PageAllocator(8), list[int]()
    for _ in range(500):
        action = rng.choice(("allocate", "add", "remove"))
        if action == "allocate" and pages.num_free:
            taken = pages.allocate(rng.randrange(1, pages.num_free + 1))
            assert not set(taken) & set(owned)
            owned += taken
        elif action == "add" and owned:
            owned.append(rng.choice(owned))
            pages.add_owner(owned[-1:])
        elif action == "remove" and owned:
            pages.remove_owner([owned.pop(rng.randrange(len(owned)))])
        assert [pages.num_owners(page) for page in range(8)] == [owned.count(page) for page in range(8)]
        assert pages.num_free == 8 - len(set(owned))
