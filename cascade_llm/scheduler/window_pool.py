"""The pages of an attention kind with a window, in a pool of its own beside that of a kind that reads everything.

A page of a sequence has one id, under which scheduler, prefix tree and planner know it, and which is its place in the
pool of the first kind. In the pool of a windowed kind it has a place only while a window reaches it, and for as long
afterwards as nobody needs the room: the id stays, and what other kinds keep of the page stays with it.

    page of a sequence     0   1   2   3   4   5        the window begins in page 3
    pool of the first      7   8   9  10  11  12        its id
    pool of the window     -   5   -   0   3   4        its place; page 1 is cached: held by none, given up for room
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from cascade_llm.config import SchedulerConfig
from cascade_llm.metrics import PageCounts
from cascade_llm.scheduler.page_allocator import PageAllocator

__all__ = ["WindowPool", "window_pools"]

KEPT_BEHIND = 1
"""Pages before a window that its sequence holds all the same. Its full pages end up to a page before its last token,
and who goes on from there (a session, a prompt that begins alike) reads from a page before."""


class WindowPool:
    """Which place of the pool holds which page, who holds it, and which place is taken next.

    Each sequence holds the pages that its next rows reach, a session those that its next turn will. A place that nobody
    holds is cached; of these the one that was held longest ago is taken first. Two pages of the same content may have
    one place: where a sequence moves from pages of its own to those of the prefix tree, and forks are still to follow.
    """

    def __init__(
        self, window_len: int, page_size: int, *, num_places: int, total_pages: int, keep_unheld: bool = True
    ) -> None:
        """Begin with all places free.

        Args:
            window_len: tokens that the kind reads
            page_size: tokens per page
            num_places: pages of this pool
            total_pages: of the first kind's pool: how many ids there are
            keep_unheld: whether places that nobody holds are cached
        """
        self.window_len, self._page_size, self._keep_unheld = window_len, page_size, keep_unheld
        self.places = array("i", [-1]) * total_pages
        """[total_pages] the place of each page, -1 where it has none; changes as pages come and go."""
        self._allocator = PageAllocator(num_places)
        self._num_holds = array("i", bytes(4 * num_places))
        self._pages: list[list[int]] = [[] for _ in range(num_places)]  # that have this place
        self._unheld: OrderedDict[int, None] = OrderedDict()
        self._session_holds: Counter[int] = Counter()

    @property
    def num_free(self) -> int:
        """Places without a page."""
        return self._allocator.num_free

    @property
    def num_cached(self) -> int:
        """Places that nobody holds."""
        return len(self._unheld)

    @property
    def num_session_places(self) -> int:
        """Places that any session holds."""
        return len(self._session_holds)

    @property
    def num_session_places_alone(self) -> int:
        """Places that nobody but sessions holds."""
        return sum(1 for place, count in self._session_holds.items() if self._num_holds[place] == count)

    @property
    def counts(self) -> PageCounts:
        """Where the places are."""
        total, free, cached = self._allocator.total_pages, self.num_free, self.num_cached
        return PageCounts(total, free, total - free - cached, cached, self.num_session_places)

    # -- what a window reaches ----------------------------------------------------------------------------------------

    def first_read_page(self, num_tokens: int) -> int:
        """The first page of a sequence that the row behind so many tokens reads."""
        return max(0, num_tokens + 1 - self.window_len) // self._page_size

    def first_held_page(self, num_tokens: int) -> int:
        """The first page that a sequence of so many planned tokens holds."""
        return max(0, self.first_read_page(num_tokens) - KEPT_BEHIND)

    def served_pages(self, pages: array[int], num_pages: int) -> int:
        """The longest prefix, of at most `num_pages` pages, behind which all that a row reads has a place."""
        places = self.places
        while num_pages:
            first = self.first_read_page(num_pages * self._page_size)
            missing = next((i for i in range(num_pages - 1, first - 1, -1) if places[pages[i]] < 0), None)
            if missing is None:
                break
            num_pages = missing  # a longer prefix reads the missing page too
        return num_pages

    def num_unused(self, pages: Iterable[int]) -> int:
        """How many of these pages no sequence holds."""
        places, holds, sessions = self.places, self._num_holds, self._session_holds
        return sum(1 for page in pages if holds[places[page]] == sessions.get(places[page], 0))

    # -- places that come and go --------------------------------------------------------------------------------------

    def take(self, pages: Iterable[int]) -> None:
        """A place for each of these new pages, held once. The caller has made room."""
        pages = array("i", pages)
        for page, place in zip(pages, self._allocator.allocate(len(pages)), strict=True):
            assert self.places[page] < 0, f"page {page} has a place"
            self.places[page], self._num_holds[place] = place, 1
            self._pages[place].append(page)

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each of these pages, which have places."""
        self._hold([self.places[page] for page in pages])

    def release(self, pages: Iterable[int]) -> None:
        """One holder less for each of these pages."""
        self._release([self.places[page] for page in pages])

    def hold_for_session(self, pages: Iterable[int]) -> list[int]:
        """A session holds those of these pages that have a place; returns the places, for `release_session`."""
        held = [self.places[page] for page in pages if self.places[page] >= 0]
        self._hold(held)
        self._session_holds.update(held)
        return held

    def release_session(self, places: Iterable[int]) -> None:
        """A session gives up what it held."""
        for place in places:
            self._session_holds[place] -= 1
            if not self._session_holds[place]:
                del self._session_holds[place]
            self._release([place])

    def merge(self, own: array[int], tree: array[int], num_left_behind: int) -> None:
        """A sequence moves on from pages of its own to the prefix tree's, which have the same content.

        Where the tree's page has no place, it gets that of the sequence's.

        Args:
            own, tree: as many pages
            num_left_behind: of these the first so many, which the sequence does not hold
        """
        for index, (mine, theirs) in enumerate(zip(own, tree, strict=True)):
            place = self.places[mine]
            if self.places[theirs] < 0:
                if place >= 0:
                    self.places[theirs] = place
                    self._pages[place].append(theirs)
            elif index >= num_left_behind:
                self._hold([self.places[theirs]])
                self._release([place])

    def forget(self, pages: Iterable[int]) -> None:
        """These pages are free: their places are, unless others have them too."""
        for page in pages:
            place = self.places[page]
            if place >= 0:
                self._take_place(page)
                if not self._pages[place]:
                    assert not self._num_holds[place], f"page {page} is held in a window's pool, and free"
                    self._unheld.pop(place, None)
                    self._allocator.remove_owner([place])

    def drop_unheld(self, pages: Iterable[int]) -> None:
        """Give up the places of these pages that nobody holds: what is in them turned out not to be good."""
        for page in pages:
            place = self.places[page]
            if place in self._unheld:
                del self._unheld[place]
                self._free(place)

    def make_room(self, num_places: int) -> None:
        """Have so many free places; the caller has counted those that are cached."""
        while self.num_free < num_places:
            place, _ = self._unheld.popitem(last=False)
            self._free(place)

    def check(self, held: Iterable[int], owned: Iterable[int]) -> None:
        """Assert that every place is accounted for; slow, for tests and `debug=True`.

        Args:
            held: the pages that sequences hold here, as often as they do
            owned: pages that are not free
        """
        holds = Counter(self._session_holds)
        holds.update([self.places[page] for page in held])
        assert -1 not in holds, "a page that a window reaches has no place"
        owned = set(owned)
        names = Counter[int]()
        for page, place in enumerate(self.places):
            if place >= 0:
                assert page in owned, f"page {page} is free, and has a place"
                assert page in self._pages[place]
                names[place] += 1
        for place, pages in enumerate(self._pages):
            assert len(pages) == names[place]
            assert self._num_holds[place] == holds[place], f"place {place}"
            assert (place in self._unheld) == (bool(pages) and not holds[place])
            assert self._allocator.num_owners(place) == bool(pages)
        assert self.num_free + sum(map(bool, self._pages)) == self._allocator.total_pages

    def _hold(self, places: Iterable[int]) -> None:
        for place in places:
            assert place >= 0, "a page is held that has no place"
            if not self._num_holds[place]:
                del self._unheld[place]
            self._num_holds[place] += 1

    def _release(self, places: Iterable[int]) -> None:
        for place in places:
            assert place >= 0, "a page is released that has no place"
            self._num_holds[place] -= 1
            if not self._num_holds[place]:
                if self._keep_unheld:
                    self._unheld[place] = None
                else:
                    self._free(place)

    def _free(self, place: int) -> None:
        """Take a place that nobody holds from all its pages."""
        for page in list(self._pages[place]):
            self._take_place(page)
        self._allocator.remove_owner([place])

    def _take_place(self, page: int) -> None:
        self._pages[self.places[page]].remove(page)
        self.places[page] = -1


def window_pools(config: SchedulerConfig) -> tuple[WindowPool, ...]:
    """The pools of all attention kinds but the first; none where all kinds have their pages in one pool."""
    return tuple(
        WindowPool(
            window_len,
            config.page_size,
            num_places=num_places,
            total_pages=config.total_pages,
            keep_unheld=config.enable_prefix_caching,
        )
        for window_len, num_places in zip(config.attention_kinds[1:], config.window_pages, strict=False)
        if window_len is not None
    )
