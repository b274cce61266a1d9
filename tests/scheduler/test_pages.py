"""Pages: owners and the order of the free ones; tables that share, fork, publish, and make room."""

from __future__ import annotations

import random
from collections.abc import Sequence as Tokens

import pytest

from cascade_llm.plan import PageCopy
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.page_allocator import PageAllocator
from cascade_llm.scheduler.page_keys import root_key
from cascade_llm.scheduler.pages import PageTables
from cascade_llm.scheduler.sequence import Request, Sequence

# the allocator


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


# the tables


SIZE = 4


def sequence_of(tokens: Tokens[int], *, prompt_logprobs: int | None = None, salt: bytes = b"") -> Sequence:
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    request = Request(request_id="a", prompt_token_ids=list(tokens), params=params, seed=0)
    return Sequence(request, 0, 0, SIZE, root_key(salt))


def admit(tables: PageTables, sequence: Sequence, *, publish: bool = True) -> None:
    """Give a sequence pages for all its tokens, as a scheduler does."""
    match = tables.match(sequence)
    assert tables.can_admit(sequence, match, sequence.total_len - match.num_pages * SIZE, reserve=0)
    tables.admit(sequence, match)
    sequence.planned_len = match.num_pages * SIZE
    assert tables.reserve(sequence, sequence.total_len) == []
    sequence.planned_len = sequence.total_len
    if publish:
        tables.publish_planned(sequence, sequence.total_len)


def grow(tables: PageTables, sequence: Sequence, tokens: Tokens[int]) -> list[PageCopy]:
    """Generate tokens, with their K/V."""
    sequence.token_ids.extend(tokens)
    copies = tables.reserve(sequence, sequence.total_len)
    assert copies is not None
    sequence.planned_len = sequence.total_len
    return copies


def counts(tables: PageTables) -> tuple[int, int, int]:
    found = tables.counts
    assert found.free_pages + found.held_pages + found.cached_pages == found.total_pages
    return found.free_pages, found.held_pages, found.cached_pages


def test_a_match_ends_before_the_last_token() -> None:
    tables = PageTables(16, SIZE, keep_unheld=True)
    admit(tables, sequence_of(range(12)))
    for length, num_pages in ((1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (12, 2), (13, 3), (40, 3)):
        assert tables.match(sequence_of(range(length))).num_pages == num_pages
    assert tables.match(sequence_of([*range(8), 99, 99])).num_pages == 2
    assert tables.match(sequence_of(range(12), salt=b"tenant")).num_pages == 0


def test_no_match_where_every_prompt_token_is_reported() -> None:
    tables = PageTables(16, SIZE, keep_unheld=True)
    admit(tables, sequence_of(range(12)))
    reporting = sequence_of(range(12), prompt_logprobs=0)
    assert tables.match(reporting).num_pages == 0
    reporting.num_prompt_logprobs = 11
    assert tables.match(reporting).num_pages == 2


def test_sharers_hold_the_same_pages() -> None:
    tables = PageTables(16, SIZE, keep_unheld=True)
    first, second = sequence_of(range(10)), sequence_of([*range(8), 50, 51, 52])
    admit(tables, first)
    admit(tables, second)
    assert list(first.pages) == [0, 1, 2]
    assert list(second.pages) == [0, 1, 3]
    tables.check([first, second])
    assert counts(tables) == (12, 4, 0)
    tables.release(first)
    assert counts(tables) == (13, 3, 0)
    tables.release(second)
    assert counts(tables) == (14, 0, 2)
    tables.check([])


def test_a_fork_shares_all_pages_and_copies_the_partial_one_before_it_writes() -> None:
    tables = PageTables(16, SIZE, keep_unheld=True)
    parent, child, last = (sequence_of(range(6)) for _ in range(3))
    admit(tables, parent)
    for each in (child, last):
        tables.fork(parent, each)
        each.planned_len = parent.planned_len
    assert list(parent.pages) == list(child.pages) == list(last.pages) == [0, 1]
    assert [tables.allocator.num_owners(page) for page in (0, 1)] == [1, 3]
    assert grow(tables, parent, [60]) == [PageCopy(1, 2)]
    assert grow(tables, child, [70]) == [PageCopy(1, 3)]
    assert grow(tables, last, [80]) == [], "the last owner writes in place"
    tables.check([parent, child, last])
    for each in (parent, child, last):
        tables.release(each)
    assert counts(tables) == (15, 0, 1)


def test_a_fork_on_a_page_boundary_copies_nothing() -> None:
    tables = PageTables(16, SIZE, keep_unheld=True)
    parent, child = sequence_of(range(8)), sequence_of(range(8))
    admit(tables, parent)
    tables.fork(parent, child)
    child.planned_len = 8
    assert grow(tables, parent, [60]) == grow(tables, child, [70]) == []
    assert list(parent.pages) == [0, 1, 2]
    assert list(child.pages) == [0, 1, 3]
    tables.check([parent, child])


def test_full_pages_that_forks_own_too_are_not_published() -> None:
    tables = PageTables(16, SIZE, keep_unheld=True)
    parent, child = sequence_of(range(8)), sequence_of(range(8))
    admit(tables, parent, publish=False)
    tables.fork(parent, child)
    tables.publish_planned(parent, 8)
    assert parent.tail is tables.cache.root
    tables.release(child)
    tables.publish_planned(parent, 8)
    assert parent.tail is not None
    assert parent.tail.end == 2
    tables.check([parent])


def test_sequences_that_come_to_the_same_text_share_it() -> None:
    tables = PageTables(16, SIZE, keep_unheld=True)
    first, second = sequence_of(range(6)), sequence_of(range(6))
    admit(tables, first)
    admit(tables, second)
    for each in (first, second):
        grow(tables, each, [60, 61, 62, 63, 64])
    assert list(first.pages)[1:] != list(second.pages)[1:]
    for each in (first, second):
        tables.publish_committed(each, 11)
    assert list(first.pages)[:2] == list(second.pages)[:2]
    tables.check([first, second])
    assert tables.counts.held_pages == 4, "two shared, two of their own"


def test_publishing_what_is_published_changes_nothing_and_later_keys_stay_right() -> None:
    """A second publication of the same length must not name the page after it, which is not full yet."""
    tables = PageTables(16, SIZE, keep_unheld=True)
    first, second = sequence_of(range(6)), sequence_of(range(6))
    for each in (first, second):
        admit(tables, each)
        grow(tables, each, [60, 61])
        tables.publish_committed(each, 8)  # the second finds all of it there
        grow(tables, each, [62, 63, 64, 65])
        tables.publish_committed(each, 12)
    assert list(first.pages) == list(second.pages)
    assert tables.cache.num_pages == 3
    tables.check([first, second])


def test_room_is_made_by_evicting_what_was_used_least_recently() -> None:
    tables = PageTables(5, SIZE, keep_unheld=True)
    old, recent = sequence_of(range(8)), sequence_of(range(100, 108))
    for each in (old, recent):
        admit(tables, each)
    tables.release(old)
    tables.release(recent)
    new = sequence_of(range(200, 208))
    admit(tables, new)
    assert tables.match(sequence_of(range(9))).num_pages == 1, "its last page went"
    assert tables.match(sequence_of(range(100, 109))).num_pages == 2
    tables.check([new])


def test_no_room_changes_nothing() -> None:
    tables = PageTables(3, SIZE, keep_unheld=True)
    first = sequence_of(range(12))
    admit(tables, first)
    pages = list(first.pages)
    first.token_ids.append(1)
    assert tables.reserve(first, 13) is None
    assert list(first.pages) == pages
    tables.check([first])


def test_admission_does_not_count_on_evicting_what_it_matches() -> None:
    tables = PageTables(4, SIZE, keep_unheld=True)
    first = sequence_of(range(12))
    admit(tables, first)
    tables.release(first)
    assert counts(tables) == (1, 0, 3)
    longer = sequence_of(range(20))
    match = tables.match(longer)
    assert match.num_pages == 3
    assert tables.can_admit(longer, match, 4, reserve=0)
    assert not tables.can_admit(longer, match, 4, reserve=1)
    assert not tables.can_admit(longer, match, 5, reserve=0)
    other = sequence_of([*range(6), 99])  # matches the first page of the run: the other two can go
    match = tables.match(other)
    assert match.num_pages == 1
    assert tables.can_admit(other, match, 12, reserve=0)
    assert not tables.can_admit(other, match, 13, reserve=0)


def test_without_prefix_caching_nothing_outlives_its_sequences() -> None:
    tables = PageTables(16, SIZE, keep_unheld=False)
    parent, child = sequence_of(range(10)), sequence_of(range(10))
    admit(tables, parent)
    tables.fork(parent, child)
    child.planned_len = 10
    tables.release(parent)
    assert counts(tables) == (13, 3, 0)
    tables.check([child])
    tables.release(child)
    assert counts(tables) == (16, 0, 0)
    tables.check([])


def test_discarding_drops_what_nobody_else_uses() -> None:
    for keep in (True, False):
        tables = PageTables(16, SIZE, keep_unheld=keep)
        bad, other = sequence_of(range(16)), sequence_of([*range(8), 99])
        admit(tables, bad)
        admit(tables, other)
        tables.discard(bad)
        tables.check([other])
        assert counts(tables) == (13, 3, 0)
        assert tables.match(sequence_of(range(17))).num_pages == 2
