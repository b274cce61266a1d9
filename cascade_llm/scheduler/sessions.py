"""Sessions: conversations whose pages stay held between their turns.

A session has a name within its tenant and one hold on the path of its last turn's full pages. It is held as a running
sequence holds its own, so it is never evicted page by page; but it is given up whole, the least recently used first,
for its time to live, for the budget that all share, and before a request would have to wait or be preempted for want of
pages. What is given up stays cached, as after any request.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cascade_llm.scheduler.prefix_cache import PrefixCache, RadixNode
from cascade_llm.scheduler.window_pool import WindowPool

__all__ = ["MOST_SESSIONS", "SessionInfo", "SessionLimits", "SessionName", "SessionUse", "Sessions"]

MOST_SESSIONS = 1024
"""However few pages they hold: forks of one conversation hold the same ones."""


@dataclass(frozen=True, kw_only=True)
class SessionLimits:
    """What may stay between requests: what all sessions together may hold, how long, and what a tenant may keep."""

    share: float = 0.5
    """Of the pool's pages, 0 to 1; pages that several sessions hold count once."""
    ttl_s: float = 1800.0
    """Seconds since a session's last turn began or ended, after which it is given up."""
    tenant_shares: Mapping[str, float] = field(default_factory=dict)
    """Of the pool's pages, above 0 to 1, what a tenant may leave behind: cached, or held by its sessions alone. Pages
    that its running sequences use do not count; a tenant that is not named may fill the pool."""


@dataclass(frozen=True, kw_only=True)
class SessionUse:
    """A request is a turn of a session, which holds its pages from its end on."""

    session_id: str
    fork_of: str | None = None
    """The session begins on the pages of this one; where there is none of that name, it begins empty."""
    drop_on_abort: bool = False
    """Whether the session is dropped where the request is aborted."""


class SessionName(NamedTuple):
    """What no two sessions share."""

    tenant: str
    session_id: str


class SessionInfo(NamedTuple):
    """One session."""

    tenant: str
    session_id: str
    num_pages: int
    """On its path, whoever else holds them."""
    idle_s: float
    """Seconds since it was used."""


class _Session(NamedTuple):
    tail: RadixNode
    held_from: int
    """see `PrefixCache.hold`"""
    used_s: float
    places: list[list[int]]
    """in each window's pool, of the pages that the next turn reads"""


class Sessions:
    """The holds of all sessions, in the order in which they were used."""

    def __init__(
        self,
        cache: PrefixCache,
        total_pages: int,
        limits: SessionLimits,
        clock: Callable[[], float],
        window_pools: tuple[WindowPool, ...] = (),
    ) -> None:
        """`clock`: seconds, from any start; `window_pools`: of the kinds that have pools of their own."""
        self._cache, self._total_pages, self._clock = cache, total_pages, clock
        self._window_pools = window_pools
        self._limits = limits
        self._by_name: OrderedDict[SessionName, _Session] = OrderedDict()
        self._holds: Mapping[RadixNode, int] = {}
        self._holds_version = (cache.version, cache.num_splits)

    @property
    def paths(self) -> list[tuple[RadixNode, int]]:
        """Where the paths of all sessions end, and from which page on they are held."""
        return [(session.tail, session.held_from) for session in self._by_name.values()]

    @property
    def budget(self) -> int:
        """Pages that all together may hold."""
        return int(self._limits.share * self._total_pages)

    def tenant_budget(self, tenant: str) -> int | None:
        """Pages that a tenant may leave behind; None is no limit."""
        share = self._limits.tenant_shares.get(tenant)
        return None if share is None else int(share * self._total_pages)

    @property
    def tenants_with_budgets(self) -> Iterable[str]:
        """Those that have one."""
        return self._limits.tenant_shares

    @property
    def num_pages(self) -> int:
        """Pages that any session holds."""
        return sum(len(node.pages) for node in self.holds)

    @property
    def num_pages_alone(self) -> int:
        """Pages that nobody but sessions holds: cached, once these are given up."""
        return sum(len(node.pages) for node in self._alone)

    def num_pages_alone_of(self, tenant: str) -> int:
        """Those of a tenant."""
        return sum(len(node.pages) for node in self._alone if node.owner == tenant)

    @property
    def _alone(self) -> Iterable[RadixNode]:
        return (node for node, count in self.holds.items() if node.num_holds == count)

    @property
    def holds(self) -> Mapping[RadixNode, int]:
        """How many sessions hold each node. Counted anew only where holds or nodes have changed."""
        version = (self._cache.version, self._cache.num_splits)
        if self._holds_version != version:
            holds: dict[RadixNode, int] = {}
            for path in self.paths:
                for node in self._cache.held_path(*path):
                    holds[node] = holds.get(node, 0) + 1
            self._holds, self._holds_version = holds, version
        return self._holds

    def limit(self, limits: SessionLimits) -> None:
        """Set the limits; what is beyond them is given up."""
        self._limits = limits
        self._fit()

    def begin_turn(self, tenant: str, use: SessionUse) -> None:
        """A turn was asked for: the session, and the one that it branches off, are used now."""
        self.expire()
        name = SessionName(tenant, use.session_id)
        source = None if use.fork_of is None else SessionName(tenant, use.fork_of)
        if source is not None and source in self._by_name:
            self._touch(source)
            self.keep(name, self._by_name[source].tail, self._by_name[source].held_from)
        elif name in self._by_name:
            self._touch(name)

    def keep(self, name: SessionName, tail: RadixNode, held_from: int = 0) -> None:
        """A session holds the path to `tail`, from page `held_from` on, and no longer what it held.

        A path without a page is not held, nor one beyond the whole budget, for which all others would be given up, nor
        one beyond the tenant's.
        """
        self._cache.hold_again(tail, held_from)
        places = [self._hold_window(pool, tail) for pool in self._window_pools]
        self.drop(name)
        self._by_name[name] = _Session(tail, held_from, self._clock(), places)
        own_budget = self.tenant_budget(name.tenant)
        if not 0 < tail.end - held_from <= (self.budget if own_budget is None else min(self.budget, own_budget)):
            self.drop(name)
        self._fit()

    def end_turn(self, name: SessionName, use: SessionUse, path: tuple[RadixNode, int] | None, reason: str) -> None:
        """Hold the path of a turn that ends, where it has one; an error may have filled its pages wrong.

        path: where it ends, and from which page on the turn held it
        """
        if reason == "error" or (reason == "abort" and use.drop_on_abort):
            self.drop(name)
        elif path is not None:
            self.keep(name, *path)

    def drop(self, name: SessionName) -> bool:
        """Give a session up; returns whether it was there."""
        session = self._by_name.pop(name, None)
        if session is not None:
            self._cache.release(session.tail, session.held_from)
            for pool, places in zip(self._window_pools, session.places, strict=True):
                pool.release_session(places)
        return session is not None

    def drop_oldest(self) -> None:
        """Give up the least recently used; there must be one."""
        self.drop(next(iter(self._by_name)))

    def drop_oldest_of(self, tenant: str) -> None:
        """The same of a tenant's."""
        self.drop(next(name for name in self._by_name if name.tenant == tenant))

    def drop_all(self) -> None:
        """Give up every session."""
        while self._by_name:
            self.drop_oldest()

    def expire(self) -> None:
        """Give up those whose time is over."""
        while self._by_name:
            oldest = next(iter(self._by_name.values()))
            if self._clock() - oldest.used_s < self._limits.ttl_s:
                return
            self.drop_oldest()

    def infos(self) -> list[SessionInfo]:
        """All sessions, the least recently used first."""
        self.expire()
        now_s = self._clock()
        return [
            SessionInfo(*name, item.tail.end - item.held_from, now_s - item.used_s)
            for name, item in self._by_name.items()
        ]

    def num_pages_of(self, tenant: str) -> int:
        """Pages that any session of a tenant holds."""
        own = [(item.tail, item.held_from) for name, item in self._by_name.items() if name.tenant == tenant]
        return sum(len(node.pages) for node in {node for path in own for node in self._cache.held_path(*path)})

    @property
    def _is_beyond_budget(self) -> bool:
        return self.num_pages > self.budget or any(
            pool.num_session_places > self._limits.share * pool.counts.total_pages for pool in self._window_pools
        )

    def _hold_window(self, pool: WindowPool, tail: RadixNode) -> list[int]:
        """Hold what the row behind the path to `tail` reads; returns the places."""
        first = pool.first_read_page(tail.end * self._cache.page_size)
        return pool.hold_for_session(self._cache.pages_between(tail, first))

    def _touch(self, name: SessionName) -> None:
        self._by_name[name] = self._by_name[name]._replace(used_s=self._clock())
        self._by_name.move_to_end(name)

    def _fit(self) -> None:
        self.expire()
        while self._by_name and (len(self._by_name) > MOST_SESSIONS or self._is_beyond_budget):
            self.drop_oldest()
