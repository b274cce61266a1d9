"""The page table of each sequence: where its pages come from, who else has them, and where they go."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable

from cascade_llm.metrics import PageCounts
from cascade_llm.plan import PageCopy
from cascade_llm.scheduler.page_allocator import PageAllocator
from cascade_llm.scheduler.prefix_cache import PrefixCache, PrefixMatch
from cascade_llm.scheduler.sequence import Sequence
from cascade_llm.scheduler.sessions import SessionLimits, Sessions
from cascade_llm.scheduler.window_pool import WindowPool

__all__ = ["PageTables"]

STRIDES_PER_WINDOW = 8
"""A sequence gives up what windows have left behind in as many parts of the widest."""
PLANNED_AHEAD = 2
"""Pages that plans may still name when windows have left them behind: a run of decode steps keeps its first pages."""


class PageTables:
    """Gives sequences their pages, from the free list, by eviction, by sharing, and takes them back.

    Owns the page tables of all sequences, over one allocator and one prefix cache, and what sessions hold of that.

    A table starts with the pages on the path to the sequence's tail, which the prefix cache owns; the rest are the
    sequence's own. An own page with several owners (after a fork) is copied before it is written.

    Where kinds with windows have pools of their own, each page has a place there too while a window reaches it: what a
    table takes, shares and gives back, it takes, shares and gives back in all pools (`WindowPool`).
    """

    def __init__(
        self,
        total_pages: int,
        page_size: int,
        *,
        keep_unheld: bool,
        window_len: int | None = None,
        window_pools: tuple[WindowPool, ...] = (),
        session_limits: SessionLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with all pages free.

        Args:
            total_pages: of the pool
            page_size: tokens per page
            keep_unheld: whether pages that no sequence holds stay for later requests (prefix caching)
            window_len: of the attention kind that reads most: pages that it has left behind are not held
            window_pools: of the other kinds, where they have any
            session_limits: what sessions may hold
            clock: seconds, from any start; for how long sessions live
        """
        self.page_size, self._window_len = page_size, window_len
        self.window_pools = window_pools
        self.allocator = PageAllocator(total_pages)
        self.cache = PrefixCache(page_size, window_len)
        self.sessions = Sessions(self.cache, total_pages, session_limits or SessionLimits(), clock, window_pools)
        self._keep_unheld = keep_unheld

    @property
    def counts(self) -> PageCounts:
        """Where the pages are."""
        total, free = self.allocator.total_pages, self.allocator.num_free
        cached = self.cache.num_cached_pages
        return PageCounts(total, free, total - free - cached, cached, self.sessions.num_pages)

    def match(self, sequence: Sequence) -> PrefixMatch:
        """What of a waiting sequence the cache has: full pages before its last known token."""
        last = len(sequence.token_ids) - 1
        if sequence.reports_prompt and sequence.num_prompt_logprobs < sequence.prompt_len - 1:
            last = sequence.num_prompt_logprobs  # a page holds no logits, and those of this token on are to be reported
        max_pages = last // self.page_size
        match = self.cache.match(sequence.token_ids, sequence.keys, max_pages)
        return self._served(match) if self.window_pools and match.num_pages else match

    def _served(self, match: PrefixMatch) -> PrefixMatch:
        """The part of a match behind which every kind has the pages that its window reaches."""
        pages, num_pages = self.cache.pages_between(match.node, 0), match.num_pages
        while (fewer := min(pool.served_pages(pages, num_pages) for pool in self.window_pools)) < num_pages:
            num_pages = fewer
        node = match.node
        while node.parent is not None and node.start >= num_pages:
            node = node.parent
        return PrefixMatch(node, num_pages)

    def can_admit(self, sequence: Sequence, match: PrefixMatch, num_new: int, reserve: int) -> bool:
        """Whether `num_new` tokens behind the match fit, with `reserve` pages left over; sessions would be given up."""
        needed = self._num_pages(match.num_pages * self.page_size + num_new) - match.num_pages
        if not all(self._has_places(pool, match, needed + reserve) for pool in self.window_pools):
            return False
        room = self.allocator.num_free + self.cache.num_cached_pages
        if needed + reserve + match.num_pages <= room:  # whoever holds the match: nothing has to be counted
            return True
        return needed + reserve + self._num_available(match) <= room + self.sessions.num_pages_alone

    def _has_places(self, pool: WindowPool, match: PrefixMatch, num_places: int) -> bool:
        """Whether so many places are left in a window's pool once what it reaches of the match is held."""
        first = pool.first_read_page(match.num_pages * self.page_size)
        room = pool.num_free + pool.num_cached
        if num_places + match.num_pages - first <= room:
            return True
        reached = self.cache.pages_between(match.node, first)[: match.num_pages - first]
        return num_places + pool.num_unused(reached) <= room + pool.num_session_places_alone

    def admit(self, sequence: Sequence, match: PrefixMatch) -> None:
        """Start the table of a sequence with the matched pages, held."""
        tail = self.cache.hold(match, sequence.keys)
        held_from = self.cache.first_held_page(tail)
        pages = array("i", bytes(held_from * array("i").itemsize))
        for node in reversed(list(self.cache.held_path(tail, held_from))):
            pages.extend(node.pages)
        sequence.tail, sequence.held_from, sequence.pages = tail, held_from, pages
        sequence.window_starts = [pool.first_read_page(len(pages) * self.page_size) for pool in self.window_pools]
        for pool, start in self._windows_of(sequence):
            pool.hold(pages[start:])

    def reserve(self, sequence: Sequence, end_len: int) -> list[PageCopy] | None:
        """Make the table hold `end_len` tokens, of which those from `planned_len` on will be written.

        Returns the copies to make first, or None, with nothing changed, when there is no room.
        """
        self._follow_windows(sequence)
        shared = self.allocator.shared(sequence.pages, sequence.planned_len // self.page_size)
        num_more = max(0, -(-end_len // self.page_size) - len(sequence.pages))
        if not shared and not num_more:
            return []
        if not self._make_room(len(shared) + num_more):
            return None
        copies = []
        for index in shared:
            source, (target,) = sequence.pages[index], self._take(1)
            copies.append(PageCopy(source, target))
            for kind, pool in enumerate(self.window_pools, start=1):
                copies.append(PageCopy(pool.places[source], pool.places[target], pool=kind))
                pool.release([source])
            self._give_back([source])
            sequence.pages[index] = target
        sequence.pages.extend(self._take(num_more))
        return copies

    def extend(self, sequences: list[Sequence]) -> array[int] | None:
        """One more page for each of these, all or none of them; returns the pages, or None when there is no room."""
        if not self._make_room(len(sequences)):
            return None
        pages = self._take(len(sequences))
        for sequence, page in zip(sequences, pages, strict=True):
            sequence.pages.append(page)
        return pages

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Give back the pages behind the first `num_tokens` tokens, which are the sequence's own."""
        num_pages = self._num_pages(num_tokens)
        for pool in self.window_pools:
            pool.release(sequence.pages[num_pages:])
        self._give_back(sequence.pages[num_pages:])
        del sequence.pages[num_pages:]

    def publish_planned(self, sequence: Sequence, known_len: int) -> None:
        """Put the full pages of the first `known_len` tokens into the tree, before the step that fills them has run.

        Ends where the tree has a page of the same content: the sequence is about to write its own.
        """
        assert sequence.tail is not None
        end = known_len // self.page_size
        if end > sequence.tail.end:
            self._append(sequence, end)

    def publish_committed(self, sequence: Sequence, known_len: int) -> None:
        """Put the full pages of the first `known_len` tokens into the tree, now that they are filled.

        Where the tree has a page of the same content, the sequence adopts that one and gives its own back. So a table
        always starts with the path to its tail, and sequences that come to the same text share it. What windows have
        left behind is not held any more.
        """
        tail = sequence.tail
        assert tail is not None
        start, end = tail.end, known_len // self.page_size
        if end > start:
            sequence.tail, adopted = self.cache.adopt(tail, sequence.token_ids, sequence.keys, end, sequence.held_from)
            if adopted:
                own = sequence.pages[start : start + len(adopted)]
                for pool, window_start in self._windows_of(sequence):
                    pool.merge(own, adopted, window_start - start)
                self._give_back(own)
                sequence.pages[start : start + len(adopted)] = adopted
            if self._window_len is not None and self._fill_hollow(sequence, end):
                self.publish_committed(sequence, known_len)  # what is behind it may be there
                return
            self._append(sequence, end)
        if self._window_len is not None:
            self._leave_behind(sequence, end, self._window_len)

    def _fill_hollow(self, sequence: Sequence, end: int) -> bool:
        """Give own pages up to page `end` to a hollow node of their text, if there is one."""
        tail, own = sequence.tail, self._unforked(sequence, end)
        assert tail is not None
        sequence.tail = self.cache.fill(tail, sequence.token_ids, sequence.keys, own, sequence.held_from)
        return sequence.tail is not tail

    def _leave_behind(self, sequence: Sequence, num_pages: int, window_len: int) -> None:
        """Hold no page that windows have left behind, now that `num_pages` full pages are filled.

        Nothing is given up as long as it is little: the tree would have a node for every page.
        """
        tail = sequence.tail
        assert tail is not None
        first = min(self.cache.first_read_page(num_pages) - PLANNED_AHEAD, tail.end - 1)
        if first - sequence.held_from < max(1, window_len // self.page_size // STRIDES_PER_WINDOW):
            return
        sequence.held_from = self.cache.leave_behind(tail, sequence.held_from, first, sequence.keys)
        self._trim(sequence)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give `child` the table of `parent`: the same pages, each with one more owner or hold."""
        assert parent.tail is not None
        self.cache.hold_again(parent.tail, parent.held_from)
        child.tail, child.held_from, child.pages = parent.tail, parent.held_from, parent.pages[:]
        child.window_starts = parent.window_starts[:]
        self.allocator.add_owner(child.pages[parent.tail.end :])
        for pool, start in self._windows_of(child):
            pool.hold(child.pages[start:])

    def release(self, sequence: Sequence) -> None:
        """Take the table back. Published pages stay in the tree, cached, where that is wanted."""
        self._let_go(sequence)
        self._trim(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        assert sequence.tail is not None
        for pool, start in self._windows_of(sequence):
            pool.release(sequence.pages[start:])
        self._give_back(sequence.pages[sequence.tail.end :])
        self.cache.release(sequence.tail, sequence.held_from)
        sequence.tail, sequence.held_from, sequence.pages = None, 0, array("i")

    def discard(self, sequence: Sequence) -> None:
        """Take the table back and drop its path from the tree, as far up as nothing else uses it."""
        tail, windows = sequence.tail, [(pool, sequence.pages[start:]) for pool, start in self._windows_of(sequence)]
        assert tail is not None
        self._let_go(sequence)
        for pool, pages in windows:
            pool.drop_unheld([page for page in pages if pool.places[page] >= 0])
        if self._keep_unheld:
            self._give_back(self.cache.drop(tail))
        self._trim(sequence)

    def _trim(self, sequence: Sequence) -> None:
        """Give up what of the pages that a sequence has left is not to stay."""
        if self._keep_unheld:
            self._keep_in_budget(sequence.keys.owner)
        else:
            self.evict(self.cache.num_cached_pages)

    def _keep_in_budget(self, tenant: str) -> None:
        """Give up what a tenant has left behind beyond its budget: cached pages, then sessions, both the least recently
        used first."""
        budget = self.sessions.tenant_budget(tenant)
        if budget is None:
            return
        while (excess := self.num_left_pages(tenant) - budget) > 0:
            evicted = self.cache.evict_of(tenant, excess)
            self._give_back(evicted)
            if not evicted:
                self.sessions.drop_oldest_of(tenant)

    def limit_sessions(self, limits: SessionLimits) -> None:
        """Set what may stay between requests; what is beyond it is given up."""
        self.sessions.limit(limits)
        for tenant in self.sessions.tenants_with_budgets:
            self._keep_in_budget(tenant)

    def num_left_pages(self, tenant: str) -> int:
        """Pages that a tenant's requests have left behind: cached, or held by its sessions alone."""
        return self.cache.num_cached_pages_of(tenant) + self.sessions.num_pages_alone_of(tenant)

    def forget(self) -> None:
        """Free every page that no sequence holds; sessions end."""
        self.sessions.drop_all()
        self.evict(self.cache.num_cached_pages)

    def evict(self, count: int) -> None:
        """Free `count` cached pages, the least recently used."""
        self._give_back(self.cache.evict(count))

    def _windows_of(self, sequence: Sequence) -> list[tuple[WindowPool, int]]:
        """Each window's pool, and the page from which on the sequence holds its table there."""
        return list(zip(self.window_pools, sequence.window_starts, strict=True)) if self.window_pools else []

    def _follow_windows(self, sequence: Sequence) -> None:
        """Release in each window's pool what no row from `planned_len` on reaches. A step in flight may still read it:
        who gets the place writes to it in a later step."""
        for index, (pool, start) in enumerate(self._windows_of(sequence)):
            first = pool.first_held_page(sequence.planned_len)
            if first > start:
                pool.release(sequence.pages[start:first])
                sequence.window_starts[index] = first

    def _take(self, count: int) -> array[int]:
        """Free pages with one owner each, and places in all windows' pools; room has been made."""
        pages = self.allocator.allocate(count)
        for pool in self.window_pools:
            pool.take(pages)
        return pages

    def _give_back(self, pages: Iterable[int]) -> None:
        """One owner less for each of these pages; those that have none then are free in all pools."""
        freed = self.allocator.remove_owner(pages)
        for pool in self.window_pools:
            pool.forget(freed)

    def _check_budgets(self, sequences: Iterable[Sequence]) -> None:
        used = {page for sequence in sequences for page in sequence.pages[sequence.held_from :]}
        for tenant in self.sessions.tenants_with_budgets:
            left = {page for node in self.cache.nodes() if node.owner == tenant for page in node.pages} - used
            assert len(left) == self.num_left_pages(tenant)
            assert len(left) <= (self.sessions.tenant_budget(tenant) or 0), f"tenant {tenant} is beyond its budget"

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that every page is accounted for; slow, for tests and `debug=True`.

        `sequences`: all that have a table.
        """
        self.cache.check()
        holds = self.sessions.paths
        owners: dict[int, int] = {}
        for node in self.cache.nodes():
            for page in node.pages:
                assert page not in owners, f"page {page} is in the tree twice"
                owners[page] = 1
        sequences = list(sequences)
        for sequence in sequences:
            assert sequence.tail is not None
            holds.append((sequence.tail, sequence.held_from))
            held = reversed(list(self.cache.held_path(sequence.tail, sequence.held_from)))
            path = [page for node in held for page in node.pages]
            assert list(sequence.pages[sequence.held_from : sequence.tail.end]) == path
            for page in sequence.pages[sequence.tail.end :]:
                owners[page] = owners.get(page, 0) + 1
        for page in range(self.allocator.total_pages):
            assert self.allocator.num_owners(page) == owners.get(page, 0), f"page {page}"
        assert self.allocator.num_free + len(owners) == self.allocator.total_pages
        self._check_budgets(sequences)
        nodes = [self.cache.root, *self.cache.nodes()]
        tails = Counter(tail for tail, _ in holds)
        assert Counter({node: node.num_tails for node in nodes}) == tails, "a hold has no holder"
        held_nodes = Counter(node for hold in holds for node in self.cache.held_path(*hold))
        assert Counter({node: node.num_holds for node in nodes}) == held_nodes, "a node is held otherwise than counted"
        for index, pool in enumerate(self.window_pools):
            reached = [page for sequence in sequences for page in sequence.pages[sequence.window_starts[index] :]]
            pool.check(reached, owners)

    def _append(self, sequence: Sequence, end: int) -> None:
        """Hand own pages up to page `end` to the tree, as far as forks do not own them too."""
        assert sequence.tail is not None
        own = self._unforked(sequence, end)
        sequence.tail = self.cache.append(sequence.tail, sequence.token_ids, sequence.keys, own)

    def _unforked(self, sequence: Sequence, end: int) -> array[int]:
        """The pages behind the tail, up to page `end` or to the first that forks own too."""
        assert sequence.tail is not None
        start = sequence.tail.end
        forked = (i for i in range(start, end) if self.allocator.num_owners(sequence.pages[i]) > 1)
        return sequence.pages[start : next(forked, end)]

    def _make_room(self, count: int) -> bool:
        missing = count - self.allocator.num_free
        if not self._has_room(count):
            alone = missing <= self.cache.num_cached_pages + self.sessions.num_pages_alone
            if not alone or any(
                count > pool.num_free + pool.num_cached + pool.num_session_places_alone for pool in self.window_pools
            ):
                return False
            while not self._has_room(count):
                self.sessions.drop_oldest()
        if missing > 0:
            self.evict(missing)
        for pool in self.window_pools:
            pool.make_room(count)
        return True

    def _has_room(self, count: int) -> bool:
        """Whether so many pages are free or cached, in every pool."""
        return count <= self.allocator.num_free + self.cache.num_cached_pages and all(
            count <= pool.num_free + pool.num_cached for pool in self.window_pools
        )

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _num_available(self, match: PrefixMatch) -> int:
        """Pages of a match that no sequence holds now, and that cannot be had once it is held."""
        held_by_sessions = self.sessions.holds
        path = self.cache.held_path(match.node, self.cache.first_read_page(match.num_pages))
        nodes = [n for n in path if n.num_holds == held_by_sessions.get(n, 0)]
        behind = match.node.end - match.num_pages if nodes and nodes[0] is match.node else 0
        return sum(len(node.pages) for node in nodes) - behind
