"""The prefix cache: a radix tree of full pages, with holds and LRU eviction.

A node is a run of pages that no present path leaves in the middle. The path from the root to a node spells token ids,
and the pages on it hold their K/V. A running sequence *holds* the path to its tail, the node at which its part of the
tree ends; held nodes are never evicted.

    root ── system prompt ──┬── question 1 ── answer 1
                            └── question 2

Holds are counted on every node of a path, so a node is held by at least as many sequences as any node below it.
Released paths enter the LRU order deepest node first. Hence everything below an unheld node stands before it in that
order, and the first of the order has no children: eviction needs no search.

Where all attention kinds of a model have windows, no sequence reads what they have left behind. Then it holds the last
nodes of its path only, as many as the widest window reaches, and the tree may have *hollow* nodes: their pages were
given up, and they stand for the text on the way to the nodes below them. What matches has its last pages, as far as the
window reaches, and nothing else is needed of it.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from cascade_llm.scheduler.page_keys import PageKeys, next_page_key

__all__ = ["PrefixCache", "PrefixMatch", "RadixNode"]


class RadixNode:
    """A run of full pages. Changed by `PrefixCache` alone."""

    __slots__ = (
        *("children", "end", "first_key", "num_holds", "num_tails", "owner", "pages", "parent", "start", "token_ids"),
    )

    def __init__(
        self,
        parent: RadixNode | None,
        first_key: bytes,
        token_ids: array[int],
        pages: array[int],
        start: int,
        end: int,
        owner: str = "",
    ) -> None:
        self.parent = parent
        self.owner = owner
        """The tenant, which all below it have too; the root has none."""
        self.first_key = first_key
        """Key of the first page: the name under which the parent knows this node."""
        self.token_ids = token_ids
        self.pages = pages
        """As many as the node is long, or none: then it is hollow."""
        self.start = start
        """Pages from the root to the start of this node."""
        self.end = end
        """Pages from the root to the end of this node."""
        self.children: dict[bytes, RadixNode] = {}
        self.num_holds = 0
        """Sequences that hold it: it is on their path, and inside their window."""
        self.num_tails = 0
        """Sequences whose path ends here."""


class PrefixMatch(NamedTuple):
    """How far a sequence's tokens are in the tree: `num_pages` pages, ending in the middle or at the end of `node`."""

    node: RadixNode
    num_pages: int


class PrefixCache:
    """The tree. `match` only looks; every other method changes it, as its name says."""

    def __init__(self, page_size: int, window_len: int | None = None) -> None:
        """`window_len`: of the attention kind that reads most; None reads all earlier tokens."""
        self.page_size, self._window_len = page_size, window_len
        self.root = RadixNode(None, b"", array("i"), array("i"), 0, 0)
        self.num_pages = 0
        """Pages in the tree."""
        self.num_cached_pages = 0
        """Pages in the tree that no sequence holds; all of them can be evicted."""
        self.version = 0
        """Grows when a sequence comes, goes, or moves on to pages that were there: when what is shared may change."""
        self.num_splits = 0
        """Nodes that were cut in two: who counts by node counts anew."""
        self._unheld: OrderedDict[RadixNode, None] = OrderedDict()

    def match(self, token_ids: array[int], keys: PageKeys, max_pages: int) -> PrefixMatch:
        """The longest prefix in the tree of at most `max_pages` full pages of `token_ids`, whose last pages are there
        as far as the window reaches.

        Token ids are compared as well as keys: a collision of keys costs a miss, never a wrong answer.
        """
        node, matched, best = self.root, 0, PrefixMatch(self.root, 0)
        first_there = 0
        while matched < max_pages and node.children:
            child = node.children.get(keys.key(matched))
            common = self._num_common_pages(child, token_ids, matched, max_pages) if child else 0
            if child is None or common == 0:
                break
            node, matched = child, matched + common
            if not child.pages:
                first_there = matched
            elif first_there <= self.first_read_page(matched):
                best = PrefixMatch(child, matched)
            if common < child.end - child.start:
                break
        return best

    def first_read_page(self, num_pages: int) -> int:
        """The first page that is read by the row behind so many full pages."""
        if self._window_len is None:
            return 0
        return max(0, num_pages * self.page_size + 1 - self._window_len) // self.page_size

    def hold(self, match: PrefixMatch, keys: PageKeys) -> RadixNode:
        """Hold the matched path for a sequence, as far as the window reaches, and return its tail; splits a node that
        matched in part."""
        tail = match.node
        if tail is not self.root and match.num_pages < tail.end:
            tail = self._split(tail, match.num_pages - tail.start, keys)
        self.hold_again(tail, self.first_held_page(tail))
        return tail

    def first_held_page(self, tail: RadixNode) -> int:
        """The page with which the first node begins that `hold` holds of the path to `tail`."""
        first, held_from = self.first_read_page(tail.end), 0
        for node in self.held_path(tail, first):
            held_from = node.start
        return held_from

    def hold_again(self, tail: RadixNode, held_from: int = 0) -> None:
        """One more sequence holds the nodes of the path to `tail` from page `held_from` on, where one begins."""
        self.version += 1
        self._add_hold(tail, held_from)

    def release(self, tail: RadixNode, held_from: int = 0) -> None:
        """A sequence gives up its hold on the path to `tail`; what nobody holds can be evicted from now on."""
        self.version += 1
        self._remove_hold(tail, held_from)

    def leave_behind(self, tail: RadixNode, held_from: int, first_page: int, keys: PageKeys) -> int:
        """A sequence's windows have left the pages before `first_page` behind: it holds no node that ends before, and a
        node that it is in is split there. Returns from which page on it holds its path now.

        `first_page` lies before the end of the tail, which is held in any case.
        """
        assert first_page < tail.end
        left = list[RadixNode]()
        for node in self.held_path(tail, held_from):
            if node.start < first_page < node.end:
                self._split(node, first_page - node.start, keys)  # the upper part comes next
            elif node.end <= first_page:
                left.append(node)
        for node in left:
            self._drop_hold(node)
        return max([held_from, *[node.end for node in left]])

    def adopt(
        self, tail: RadixNode, token_ids: array[int], keys: PageKeys, max_pages: int, held_from: int = 0
    ) -> tuple[RadixNode, array[int]]:
        """Move a sequence's hold on to what the tree has of its tokens, up to `max_pages` pages from the root.

        Returns the new tail and the tree's pages between the old one and it.
        """
        node = tail
        while node.end < max_pages and node.children:
            child = node.children.get(keys.key(node.end))
            common = self._num_common_pages(child, token_ids, node.end, max_pages) if child else 0
            if child is None or common == 0 or not child.pages:
                break
            node = self._split(child, common, keys) if common < child.end - child.start else child
        if node is not tail:
            self.version += 1
            self._move_hold(tail, node, held_from)
        return node, self.pages_between(node, tail.end)

    def fill(
        self, tail: RadixNode, token_ids: array[int], keys: PageKeys, pages: array[int], held_from: int
    ) -> RadixNode:
        """Where the text behind a sequence's tail is a hollow node's, give that node the sequence's full pages, held by
        it; returns the new tail. The pages are the tree's from now on, as many as the tail has moved."""
        child = tail.children.get(keys.key(tail.end)) if pages and tail.children else None
        if child is None or child.pages:
            return tail
        common = self._num_common_pages(child, token_ids, tail.end, tail.end + len(pages))
        if common == 0:
            return tail
        node = self._split(child, common, keys) if common < child.end - child.start else child
        node.pages = pages[:common]
        self._unheld[node] = None
        self.num_pages += common
        self.num_cached_pages += common
        self.version += 1
        self._move_hold(tail, node, held_from)
        return node

    def append(self, tail: RadixNode, token_ids: array[int], keys: PageKeys, pages: array[int]) -> RadixNode:
        """Put a sequence's full pages into the tree behind its tail, held by it; returns the new tail.

        The pages are the tree's from now on. Where the tree has the first of them already (or a colliding key),
        nothing happens: the sequence keeps its own. A path that only grows needs no keys.
        """
        if not pages:
            return tail
        size = self.page_size
        run = token_ids[tail.end * size : (tail.end + len(pages)) * size]
        if tail.num_holds == 1 and not tail.children and tail is not self.root:  # only this sequence's path ends here
            self.num_pages += len(pages)
            tail.token_ids.extend(run)
            tail.pages.extend(pages)
            tail.end += len(pages)
            return tail
        key = keys.key(tail.end)
        if key in tail.children:
            return tail
        self.num_pages += len(pages)
        child = RadixNode(tail, key, run, pages[:], tail.end, tail.end + len(pages), keys.owner)
        tail.children[key] = child
        tail.num_tails -= 1
        child.num_tails = child.num_holds = 1
        return child

    def evict(self, count: int) -> list[int]:
        """Give up `count` cached pages, least recently used first and from the end of a run; returns them, and a few
        more where a node with others below it becomes hollow."""
        assert count <= self.num_cached_pages, f"{count} pages wanted, {self.num_cached_pages} cached"
        evicted: list[int] = []
        while len(evicted) < count:
            evicted.extend(self._give_up(next(iter(self._unheld)), count - len(evicted)))
        return evicted

    def num_cached_pages_of(self, owner: str) -> int:
        """Those of a tenant; looks at every run that is cached."""
        return sum(len(node.pages) for node in self._unheld if node.owner == owner)

    def evict_of(self, owner: str, count: int) -> list[int]:
        """As `evict`, of a tenant's pages alone: at most as many as it has; looks at every run that is cached."""
        evicted: list[int] = []
        for node in [node for node in self._unheld if node.owner == owner]:
            if len(evicted) >= count:
                break
            evicted.extend(self._give_up(node, count - len(evicted)))
        return evicted

    def _give_up(self, node: RadixNode, count: int) -> array[int]:
        """Up to `count` pages of an unheld node below which nothing is unheld, or all where it becomes hollow."""
        if node.children:
            return self._hollow(node)
        return self._truncate(node, max(0, len(node.pages) - count))

    def drop(self, tail: RadixNode) -> list[int]:
        """Give up the path to `tail`, as far up as nothing else uses it; returns its pages.

        For pages whose content turned out not to be good.
        """
        dropped: list[int] = []
        for node in list(self.path_up(tail)):
            if node.children or node not in self._unheld:  # used by others, or gone already
                break
            dropped.extend(self._truncate(node, 0))
        return dropped

    def nodes(self) -> Iterator[RadixNode]:
        """All nodes but the root, parents first."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """Assert the tree's own invariants; slow, for tests and `debug=True`."""
        held_pages = cached_pages = 0
        for node in self.nodes():
            assert node.parent is not None
            assert node.parent.children[node.first_key] is node
            assert len(node.token_ids) == (node.end - node.start) * self.page_size
            assert node.start == node.parent.end < node.end
            assert len(node.pages) in (
                (node.end - node.start,) if self._window_len is None else (0, node.end - node.start)
            )
            below = node.num_tails + sum(child.num_holds for child in node.children.values())
            assert node.num_holds == below if self._window_len is None else node.num_tails <= node.num_holds <= below
            assert (node.num_holds == 0 and len(node.pages) > 0) == (node in self._unheld)
            assert node.pages or (node.children and not node.num_holds), "a hollow node that nobody needs"
            held_pages += len(node.pages) if node.num_holds else 0
            cached_pages += 0 if node.num_holds else len(node.pages)
        assert cached_pages == self.num_cached_pages
        assert held_pages + cached_pages == self.num_pages
        seen: set[RadixNode] = set()
        for node in self._unheld if self._window_len is None else ():
            assert all(child in seen for child in node.children.values()), "a node stands before one of its children"
            seen.add(node)

    def path_up(self, tail: RadixNode) -> Iterator[RadixNode]:
        """The nodes from `tail` up, without the root."""
        node = tail
        while node.parent is not None:
            yield node
            node = node.parent

    def held_path(self, tail: RadixNode, held_from: int) -> Iterator[RadixNode]:
        """The nodes from `tail` up that a sequence holds, which holds its path from page `held_from` on."""
        node: RadixNode | None = tail
        while node is not None and node.end > held_from:
            yield node
            node = node.parent

    def pages_between(self, node: RadixNode, start: int) -> array[int]:
        """The pages on the path to `node` from page `start` on; those of hollow nodes are left out."""
        runs = []
        current: RadixNode = node
        while current.end > start:
            runs.append(current.pages[max(0, start - current.start) :])
            assert current.parent is not None
            current = current.parent
        pages = array("i")
        for run in reversed(runs):
            pages.extend(run)
        return pages

    def _add_hold(self, tail: RadixNode, held_from: int) -> None:
        tail.num_tails += 1
        for node in self.held_path(tail, held_from):
            if node.num_holds == 0:
                del self._unheld[node]
                self.num_cached_pages -= len(node.pages)
            node.num_holds += 1

    def _remove_hold(self, tail: RadixNode, held_from: int) -> None:
        tail.num_tails -= 1
        for node in self.held_path(tail, held_from):
            self._drop_hold(node)

    def _drop_hold(self, node: RadixNode) -> None:
        node.num_holds -= 1
        if node.num_holds == 0:
            self._unheld[node] = None
            self.num_cached_pages += len(node.pages)

    def _hollow(self, node: RadixNode) -> array[int]:
        """Take the pages of an unheld node that has others below it."""
        given_up, node.pages = node.pages, array("i")
        del self._unheld[node]
        self.num_pages -= len(given_up)
        self.num_cached_pages -= len(given_up)
        return given_up

    def _move_hold(self, tail: RadixNode, lower: RadixNode, held_from: int) -> None:
        self._add_hold(lower, held_from)
        self._remove_hold(tail, held_from)

    def _num_common_pages(self, child: RadixNode, token_ids: array[int], start: int, end: int) -> int:
        """Pages at the start of `child` that equal the sequence's pages from `start` on, before `end`."""
        size, most = self.page_size, min(child.end - child.start, end - start)
        theirs, ours = child.token_ids, token_ids[start * size : (start + most) * size]
        if theirs[: most * size] == ours:
            return most
        low, high = 0, most  # the first `low` pages are equal, the first `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            if theirs[low * size : middle * size] == ours[low * size : middle * size]:
                low = middle
            else:
                high = middle
        return low

    def _split(self, node: RadixNode, num_pages: int, keys: PageKeys) -> RadixNode:
        """Cut a node after `num_pages` pages and return the new upper part; the object stays the lower part.

        Whoever holds `node` as its tail keeps the whole path. `keys` are of a sequence that matches the upper part.
        """
        size, parent = self.page_size, node.parent
        self.num_splits += 1
        assert parent is not None
        cut = node.start + num_pages
        assert node.start < cut < node.end
        tokens, pages = node.token_ids[: num_pages * size], node.pages[:num_pages]
        upper = RadixNode(parent, node.first_key, tokens, pages, node.start, cut, node.owner)
        node.token_ids, node.pages, node.start = node.token_ids[num_pages * size :], node.pages[num_pages:], cut
        node.first_key = next_page_key(keys.key(cut - 1), node.token_ids[:size])
        parent.children[upper.first_key] = upper
        node.parent = upper
        upper.children[node.first_key] = node
        upper.num_holds = node.num_holds
        if upper.num_holds == 0 and pages:  # held by the caller next, so its place in the order does not matter
            self._unheld[upper] = None
        return upper

    def _truncate(self, node: RadixNode, num_pages: int) -> array[int]:
        """Keep the first `num_pages` pages of an unheld node without children; remove it when that is none."""
        assert not node.children
        assert node.num_holds == 0
        given_up = node.pages[num_pages:]
        self.num_pages -= len(given_up)
        self.num_cached_pages -= len(given_up)
        if num_pages:
            del node.pages[num_pages:], node.token_ids[num_pages * self.page_size :]
            node.end -= len(given_up)
        else:
            del self._unheld[node]
            self._remove(node)
        return given_up

    def _remove(self, node: RadixNode) -> None:
        """Take a node without children out of the tree, and hollow ones above it that have none then."""
        while node.parent is not None and not node.children:
            del node.parent.children[node.first_key]
            node = node.parent
            if node.pages or node.num_tails:
                break
