"""The pages of the pool: which are free, who owns the others, and the table of each sequence."""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable

from cascade_llm.metrics import PageCounts
from cascade_llm.plan import PageCopy
from cascade_llm.scheduler.prefix_cache import PrefixCache, PrefixMatch
from cascade_llm.scheduler.sequence import Sequence
from cascade_llm.scheduler.sessions import SessionLimits, Sessions

__all__ = ["PageAllocator", "PageTables"]

STRIDES_PER_WINDOW = 8
"""A sequence gives up what windows have left behind in as many parts of the widest."""
PLANNED_AHEAD = 2
"""Pages that plans may still name when windows have left them behind: a run of decode steps keeps its first pages."""


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

    def remove_owner(self, pages: Iterable[int]) -> None:
        """One owner less for each of these pages; without any a page is free at once.

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


class PageTables:
    """Gives sequences their pages, from the free list, by eviction, by sharing, and takes them back.

    Owns the page tables of all sequences, over one allocator and one prefix cache, and what sessions hold of that.

    A table starts with the pages on the path to the sequence's tail, which the prefix cache owns; the rest are the
    sequence's own. An own page with several owners (after a fork) is copied before it is written.
    """

    def __init__(
        self,
        total_pages: int,
        page_size: int,
        *,
        keep_unheld: bool,
        window_len: int | None = None,
        session_limits: SessionLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with all pages free.

        Args:
            total_pages: of the pool
            page_size: tokens per page
            keep_unheld: whether pages that no sequence holds stay for later requests (prefix caching)
            window_len: of the attention kind that reads most: pages that it has left behind are not held
            session_limits: what sessions may hold
            clock: seconds, from any start; for how long sessions live
        """
        self.page_size, self._window_len = page_size, window_len
        self.allocator = PageAllocator(total_pages)
        self.cache = PrefixCache(page_size, window_len)
        self.sessions = Sessions(self.cache, total_pages, session_limits or SessionLimits(), clock)
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
        return self.cache.match(sequence.token_ids, sequence.keys, max_pages)

    def can_admit(self, sequence: Sequence, match: PrefixMatch, num_new: int, reserve: int) -> bool:
        """Whether `num_new` tokens behind the match fit, with `reserve` pages left over; sessions would be given up."""
        needed = self._num_pages(match.num_pages * self.page_size + num_new) - match.num_pages
        room = self.allocator.num_free + self.cache.num_cached_pages
        if needed + reserve + match.num_pages <= room:  # whoever holds the match: nothing has to be counted
            return True
        return needed + reserve + self._num_available(match) <= room + self.sessions.num_pages_alone

    def admit(self, sequence: Sequence, match: PrefixMatch) -> None:
        """Start the table of a sequence with the matched pages, held."""
        tail = self.cache.hold(match, sequence.keys)
        held_from = self.cache.first_held_page(tail)
        pages = array("i", bytes(held_from * array("i").itemsize))
        for node in reversed(list(self.cache.held_path(tail, held_from))):
            pages.extend(node.pages)
        sequence.tail, sequence.held_from, sequence.pages = tail, held_from, pages

    def reserve(self, sequence: Sequence, end_len: int) -> list[PageCopy] | None:
        """Make the table hold `end_len` tokens, of which those from `planned_len` on will be written.

        Returns the copies to make first, or None, with nothing changed, when there is no room.
        """
        shared = self.allocator.shared(sequence.pages, sequence.planned_len // self.page_size)
        num_more = max(0, -(-end_len // self.page_size) - len(sequence.pages))
        if not shared and not num_more:
            return []
        if not self._make_room(len(shared) + num_more):
            return None
        copies = []
        for index in shared:
            (target,) = self.allocator.allocate(1)
            copies.append(PageCopy(sequence.pages[index], target))
            self.allocator.remove_owner([sequence.pages[index]])
            sequence.pages[index] = target
        sequence.pages.extend(self.allocator.allocate(num_more))
        return copies

    def extend(self, sequences: list[Sequence]) -> array[int] | None:
        """One more page for each of these, all or none of them; returns the pages, or None when there is no room."""
        if not self._make_room(len(sequences)):
            return None
        pages = self.allocator.allocate(len(sequences))
        for sequence, page in zip(sequences, pages, strict=True):
            sequence.pages.append(page)
        return pages

    def truncate(self, sequence: Sequence, num_tokens: int) -> None:
        """Give back the pages behind the first `num_tokens` tokens, which are the sequence's own."""
        num_pages = self._num_pages(num_tokens)
        self.allocator.remove_owner(sequence.pages[num_pages:])
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
                self.allocator.remove_owner(sequence.pages[start : start + len(adopted)])
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
        self.allocator.add_owner(child.pages[parent.tail.end :])

    def release(self, sequence: Sequence) -> None:
        """Take the table back. Published pages stay in the tree, cached, where that is wanted."""
        self._let_go(sequence)
        self._trim(sequence)

    def _let_go(self, sequence: Sequence) -> None:
        assert sequence.tail is not None
        self.allocator.remove_owner(sequence.pages[sequence.tail.end :])
        self.cache.release(sequence.tail, sequence.held_from)
        sequence.tail, sequence.held_from, sequence.pages = None, 0, array("i")

    def discard(self, sequence: Sequence) -> None:
        """Take the table back and drop its path from the tree, as far up as nothing else uses it."""
        tail = sequence.tail
        assert tail is not None
        self._let_go(sequence)
        if self._keep_unheld:
            self.allocator.remove_owner(self.cache.drop(tail))
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
            self.allocator.remove_owner(evicted)
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
        self.allocator.remove_owner(self.cache.evict(count))

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
        if missing > self.cache.num_cached_pages:
            if missing > self.cache.num_cached_pages + self.sessions.num_pages_alone:
                return False
            while missing > self.cache.num_cached_pages:
                self.sessions.drop_oldest()
        if missing > 0:
            self.evict(missing)
        return True

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def _num_available(self, match: PrefixMatch) -> int:
        """Pages of a match that no sequence holds now, and that cannot be had once it is held."""
        held_by_sessions = self.sessions.holds
        path = self.cache.held_path(match.node, self.cache.first_read_page(match.num_pages))
        nodes = [n for n in path if n.num_holds == held_by_sessions.get(n, 0)]
        behind = match.node.end - match.num_pages if nodes and nodes[0] is match.node else 0
        return sum(len(node.pages) for node in nodes) - behind
