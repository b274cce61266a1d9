"""The prefix cache against a plain dict of pages; and the keys of pages."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import xxhash

from cascade_llm.scheduler.page_keys import PageKeys, next_page_key, root_key
from cascade_llm.scheduler.prefix_cache import PrefixCache, RadixNode

SIZE = 2

Prefix = tuple[int, ...]


@dataclass
class TwinPage:
    page: int
    num_holds: int
    released_at: int = 0
    """Which release made it unheld."""


class Twin:
    """What the tree must do, page by page."""

    def __init__(self) -> None:
        self.pages: dict[Prefix, TwinPage] = {}
        self.num_releases = 0

    def match(self, token_ids: Sequence[int], max_pages: int) -> int:
        count = 0
        while count < max_pages and tuple(token_ids[: (count + 1) * SIZE]) in self.pages:
            count += 1
        return count

    def path(self, token_ids: Sequence[int], start: int, end: int) -> list[TwinPage]:
        return [self.pages[tuple(token_ids[: (i + 1) * SIZE])] for i in range(start, end)]

    def hold(self, token_ids: Sequence[int], num_pages: int) -> None:
        for page in self.path(token_ids, 0, num_pages):
            page.num_holds += 1

    def release(self, token_ids: Sequence[int], num_pages: int) -> None:
        self.num_releases += 1
        for page in self.path(token_ids, 0, num_pages):
            page.num_holds -= 1
            page.released_at = self.num_releases if page.num_holds == 0 else 0

    def append(self, token_ids: Sequence[int], start: int, pages: Sequence[int]) -> int:
        """How many of the pages were taken: all or none."""
        if not pages or tuple(token_ids[: (start + 1) * SIZE]) in self.pages:
            return 0
        for i, page in enumerate(pages, start=start + 1):
            self.pages[tuple(token_ids[: i * SIZE])] = TwinPage(page, num_holds=1)
        return len(pages)

    def evict(self, count: int) -> set[int]:
        """The pages released first; of one release, those furthest from the root."""
        order = sorted((p.released_at, -len(prefix), prefix) for prefix, p in self.pages.items() if not p.num_holds)
        return {self.pages.pop(prefix).page for _, _, prefix in order[:count]}

    def drop(self, token_ids: Sequence[int], num_pages: int) -> set[int]:
        dropped = set()
        for end in range(num_pages, 0, -1):
            prefix = tuple(token_ids[: end * SIZE])
            longer = any(len(other) > len(prefix) and other[: len(prefix)] == prefix for other in self.pages)
            if prefix not in self.pages or self.pages[prefix].num_holds or longer:
                break
            dropped.add(self.pages.pop(prefix).page)
        return dropped

    @property
    def num_cached(self) -> int:
        return sum(not page.num_holds for page in self.pages.values())


@dataclass
class Holder:
    """A sequence: its tokens, and the tail that it holds."""

    token_ids: array[int]
    keys: PageKeys
    tail: RadixNode

    @property
    def max_pages(self) -> int:
        return len(self.token_ids) // SIZE


class Machine:
    """Does the same to both and compares."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.cache, self.twin = PrefixCache(SIZE), Twin()
        self.holders: list[Holder] = []
        self.texts: list[array[int]] = [array("i")]
        self.num_pages = 0

    def run(self, num_actions: int) -> None:
        actions = {
            self.hold: 6,
            self.append: 8,
            self.adopt: 4,
            self.fork: 2,
            self.release: 6,
            self.drop: 1,
            self.evict: 1,
        }
        for _ in range(num_actions):
            self.rng.choices(list(actions), list(actions.values()))[0]()
            self.compare()
        for holder in self.holders:
            self.cache.release(holder.tail)
            self.twin.release(holder.token_ids, holder.tail.end)
        self.holders = []
        self.compare()
        assert set(self.cache.evict(self.cache.num_cached_pages)) == self.twin.evict(len(self.twin.pages))
        assert self.cache.num_pages == len(list(self.cache.nodes())) == 0

    def compare(self) -> None:
        self.cache.check()
        assert self.cache.num_pages == len(self.twin.pages)
        assert self.cache.num_cached_pages == self.twin.num_cached
        for holder in self.holders:
            path = [page for node in reversed(list(self.cache.path_up(holder.tail))) for page in node.pages]
            assert path == [page.page for page in self.twin.path(holder.token_ids, 0, holder.tail.end)]

    def hold(self) -> None:
        start = self.rng.choice(self.texts)
        text = start[: self.rng.randrange(len(start) + 1)]
        text.extend(self.rng.randrange(2) for _ in range(self.rng.randrange(24)))
        self.texts.append(text)
        keys = PageKeys(root_key(), text, SIZE)
        max_pages = self.rng.randrange(len(text) // SIZE + 1)
        match = self.cache.match(text, keys, max_pages)
        assert match.num_pages == self.twin.match(text, max_pages)
        tail = self.cache.hold(match, keys)
        assert tail.end == match.num_pages
        self.twin.hold(text, tail.end)
        self.holders.append(Holder(text, keys, tail))

    def append(self) -> None:
        if not self.holders:
            return
        holder = self.rng.choice(self.holders)
        start = holder.tail.end
        most = holder.max_pages - start
        count = self.rng.choice((most, self.rng.randrange(most + 1)))
        pages = array("i", range(self.num_pages, self.num_pages + count))
        self.num_pages += count
        holder.tail = self.cache.append(holder.tail, holder.token_ids, holder.keys, pages)
        assert holder.tail.end - start == self.twin.append(holder.token_ids, start, pages)

    def adopt(self) -> None:
        if not self.holders:
            return
        holder = self.rng.choice(self.holders)
        start = holder.tail.end
        max_pages = self.rng.randrange(start, holder.max_pages + 1)
        holder.tail, pages = self.cache.adopt(holder.tail, holder.token_ids, holder.keys, max_pages)
        end = self.twin.match(holder.token_ids, max_pages)
        assert holder.tail.end == end
        assert list(pages) == [page.page for page in self.twin.path(holder.token_ids, start, end)]
        self.twin.hold(holder.token_ids, end)
        self.twin.release(holder.token_ids, start)

    def fork(self) -> None:
        if self.holders:
            holder = self.rng.choice(self.holders)
            self.cache.hold_again(holder.tail)
            self.twin.hold(holder.token_ids, holder.tail.end)
            self.holders.append(Holder(holder.token_ids, holder.keys, holder.tail))

    def release(self) -> Holder | None:
        if not self.holders:
            return None
        holder = self.holders.pop(self.rng.randrange(len(self.holders)))
        self.twin.release(holder.token_ids, holder.tail.end)
        self.cache.release(holder.tail)
        return holder

    def drop(self) -> None:
        holder = self.release()
        if holder is not None and self.rng.random() < 0.5:
            dropped = self.twin.drop(holder.token_ids, holder.tail.end)
            assert set(self.cache.drop(holder.tail)) == dropped

    def evict(self) -> None:
        count = self.rng.randrange(self.cache.num_cached_pages // 2 + 1)
        if self.rng.random() < 0.5:
            evicted = self.cache.evict(count)
            assert len(evicted) == count
            assert set(evicted) == self.twin.evict(count)
        for _ in range(min(2, self.cache.num_cached_pages)):
            assert set(self.cache.evict(1)) == self.twin.evict(1)


@pytest.mark.parametrize("first_seed", range(0, 200, 50))
def test_tree_does_what_a_plain_dict_does(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 50):
        Machine(seed).run(150)


@pytest.mark.slow
def test_tree_does_what_a_plain_dict_does_for_long() -> None:
    for seed in range(1000, 1100):
        Machine(seed).run(1000)


class Text:
    """Tokens with their keys."""

    def __init__(self, *pages: int) -> None:
        """A page is named by a number."""
        self.token_ids = array("i", [token for page in pages for token in (page, page)])
        self.keys = PageKeys(root_key(), self.token_ids, SIZE)

    def add_to(self, cache: PrefixCache, pages: Sequence[int]) -> RadixNode:
        """Put all its pages into the tree, held."""
        count = len(self.token_ids) // SIZE
        tail = cache.hold(cache.match(self.token_ids, self.keys, count), self.keys)
        return cache.append(tail, self.token_ids, self.keys, array("i", pages))


def test_a_partial_match_splits_the_run_where_the_texts_part() -> None:
    cache = PrefixCache(SIZE)
    long = Text(1, 2, 3, 4).add_to(cache, [10, 11, 12, 13])
    other = Text(1, 2, 9)
    match = cache.match(other.token_ids, other.keys, 3)
    assert (match.node, match.num_pages) == (long, 2)
    upper = cache.hold(match, other.keys)
    assert (list(upper.pages), list(long.pages), long.parent) == ([10, 11], [12, 13], upper)
    assert (upper.num_holds, upper.num_tails, long.num_holds) == (2, 1, 1)
    cache.check()


def test_a_run_grows_in_place_while_one_sequence_holds_it() -> None:
    cache, text = PrefixCache(SIZE), Text(1, 2, 3)
    tail = cache.append(cache.root, text.token_ids, text.keys, array("i", [10]))
    assert cache.append(tail, text.token_ids, text.keys, array("i", [11])) is tail
    assert (list(tail.pages), tail.end) == ([10, 11], 2)
    cache.hold_again(tail)
    child = cache.append(tail, text.token_ids, text.keys, array("i", [12]))
    assert (child.parent, list(child.pages), tail.end) == (tail, [12], 2)
    cache.check()


def test_the_least_recently_used_run_goes_first_and_from_its_end() -> None:
    cache = PrefixCache(SIZE)
    tails = [Text(n, n, n).add_to(cache, [10 * n, 10 * n + 1, 10 * n + 2]) for n in (1, 2, 3)]
    for index in (1, 0, 2):
        cache.release(tails[index])
    cache.hold_again(tails[1])  # used again, so the last to go
    cache.release(tails[1])
    assert [cache.evict(1) for _ in range(4)] == [[12], [11], [10], [32]]
    assert cache.evict(5) == [30, 31, 20, 21, 22]


def test_held_pages_are_not_evicted() -> None:
    cache = PrefixCache(SIZE)
    tail = Text(1, 2).add_to(cache, [10, 11])
    below = Text(1, 2, 3).add_to(cache, [12])
    cache.release(below)
    assert cache.evict(1) == [12]
    with pytest.raises(AssertionError, match="1 pages wanted, 0 cached"):
        cache.evict(1)
    cache.release(tail)
    assert cache.evict(2) == [10, 11]


def test_appending_nothing_asks_for_no_key() -> None:
    """The key of a page that is not full yet would be kept, and be wrong for ever."""
    cache, text = PrefixCache(SIZE), Text(1)
    tail = text.add_to(cache, [10])
    text.token_ids.append(2)
    assert cache.append(tail, text.token_ids, text.keys, array("i")) is tail
    text.token_ids.append(2)
    assert text.keys.key(1) == Text(1, 2).keys.key(1)


def test_colliding_keys_cost_a_miss_and_never_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xxhash, "xxh3_128_digest", lambda data: b"same")
    cache, text, other = PrefixCache(SIZE), Text(1, 2), Text(1, 3)
    tail = text.add_to(cache, [10, 11])
    assert cache.match(other.token_ids, other.keys, 2).num_pages == 1
    shared = cache.hold(cache.match(other.token_ids, other.keys, 2), other.keys)
    assert cache.append(shared, other.token_ids, other.keys, array("i", [12])) is shared, "the name is taken"
    moved, adopted = cache.adopt(shared, other.token_ids, other.keys, 2)
    assert (moved, list(adopted)) == (shared, [])
    assert cache.match(text.token_ids, text.keys, 2).num_pages == 2
    cache.check()
    cache.release(tail)
    cache.release(shared)
    assert cache.evict(2) == [11, 10]


# keys


TOKENS = array("i", [1, 2, 3, 40_000, 5, 6, 7, 8])


def keys_of(tokens: array[int], *salts: bytes, page_size: int = 4) -> list[bytes]:
    keys = PageKeys(root_key(*salts), tokens, page_size)
    return [keys.key(page) for page in range(len(tokens) // page_size)]


def test_keys_are_these_in_every_process() -> None:
    assert root_key(b"model", b"tenant").hex() == "6cf42383f78a5bdb9b2a122d99196a9f"
    assert [key.hex() for key in keys_of(TOKENS, b"model", b"tenant")] == [
        "90df96f139f869a78d28fa8478612749",
        "a89d9510dc18676949afda071eb063f6",
    ]


def test_a_key_names_all_that_is_before_it() -> None:
    first, second = keys_of(TOKENS)
    changed = array("i", [9, *TOKENS[1:]])
    assert keys_of(changed)[0] != first
    assert keys_of(changed)[1] != second
    assert keys_of(TOKENS[:4]) == [first]
    assert second == next_page_key(first, TOKENS[4:])


def test_lists_of_salts_do_not_run_together() -> None:
    lists = [(), (b"",), (b"", b""), (b"ab",), (b"a", b"b"), (b"", b"ab"), (b"ab", b""), (b"a", b"b", b"")]
    assert len({root_key(*salts) for salts in lists}) == len(lists)


def test_keys_follow_a_sequence_as_it_grows() -> None:
    tokens = array("i", TOKENS[:5])
    keys = PageKeys(root_key(), tokens, 4)
    first = keys.key(0)
    with pytest.raises(AssertionError, match="page 1 is not full yet"):
        keys.key(1)
    tokens.extend(TOKENS[5:])
    assert [first, keys.key(1)] == keys_of(TOKENS)
