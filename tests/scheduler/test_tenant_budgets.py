"""What tenants with a share of the pool leave behind."""

from __future__ import annotations

import pytest

from cascade_llm.scheduler.sequence import Client
from cascade_llm.scheduler.sessions import SessionLimits, SessionUse
from tests.scheduler.simulated_engine import SimulatedEngine, small_config

SHARES = {"small": 0.25}
"""8 of 32 pages."""


def engine_with_shares() -> SimulatedEngine:
    engine = SimulatedEngine(small_config(total_pages=32))
    engine.scheduler.limit_sessions(SessionLimits(share=1.0, tenant_shares=SHARES))
    return engine


def turn(engine: SimulatedEngine, tenant: str, name: int, session_id: str | None = None, num_tokens: int = 13) -> int:
    """A request of 4 pages to its end; returns how many of its tokens were cached."""
    before = engine.counters.cached_tokens
    session = None if session_id is None else SessionUse(session_id=session_id)
    engine.add([1000 * name + i for i in range(num_tokens)], session=session, client=Client(tenant=tenant, name=tenant))
    engine.run()
    engine.check_outputs()
    engine.check()
    return int(engine.counters.cached_tokens) - before


def left(engine: SimulatedEngine) -> int:
    return engine.scheduler.tenant_pages["small"]["left_pages"]


def sessions(engine: SimulatedEngine) -> list[str]:
    return [info.session_id for info in engine.scheduler.sessions.infos()]


def test_a_tenant_evicts_its_own_and_nobody_elses() -> None:
    engine = engine_with_shares()
    turn(engine, "other", 1)
    for name in range(10, 20):
        turn(engine, "small", name)
        assert left(engine) <= 8
    assert engine.scheduler.tenant_pages == {"small": {"left_pages": 8, "budget_pages": 8}}
    assert engine.scheduler.page_counts.free_pages > 0, "the pool has room: nobody else made it evict"
    assert turn(engine, "other", 1) == 12
    assert [turn(engine, "small", name) for name in (19, 18)] == [12, 12], "the most recently used are kept"
    assert turn(engine, "small", 10) == 0


def test_without_a_share_the_pool_is_one() -> None:
    engine = engine_with_shares()
    for name in range(20):
        turn(engine, "other", name)
    assert engine.scheduler.page_counts.cached_pages > 24
    assert left(engine) == 0


def test_sessions_count_and_cached_pages_go_before_them() -> None:
    engine = engine_with_shares()
    turn(engine, "small", 1, "a")
    for name in range(10, 14):
        turn(engine, "small", name)
    assert sessions(engine) == ["a"]
    assert left(engine) == 8
    turn(engine, "small", 2, "b")
    assert sessions(engine) == ["a", "b"]
    turn(engine, "other", 3, "c")
    turn(engine, "small", 4, "d")
    assert sessions(engine) == ["b", "c", "d"], "the tenant's own oldest one was given up"
    turn(engine, "small", 5, "too long", num_tokens=40)
    assert "too long" not in sessions(engine)
    assert sessions(engine) == ["b", "c", "d"]
    assert turn(engine, "small", 4, "d") == 12


def test_a_share_that_becomes_smaller_is_kept_at_once() -> None:
    engine = engine_with_shares()
    for name in range(4):
        turn(engine, "small", name, f"s{name}")
    assert left(engine) == 8
    engine.scheduler.limit_sessions(SessionLimits(share=1.0, tenant_shares={"small": 0.125}))
    assert left(engine) == 4
    assert sessions(engine) == ["s3"]
    engine.check()


def test_what_runs_is_not_counted() -> None:
    engine = engine_with_shares()
    engine.add(range(60), client=Client(tenant="small"))
    engine.step()
    assert engine.scheduler.page_counts.held_pages > 8
    assert left(engine) == 0
    engine.run()
    engine.check_outputs()
    assert left(engine) == 8


def test_the_checks_notice_a_tenant_beyond_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with_shares()
    monkeypatch.setattr(type(engine.scheduler._roster.tables), "_keep_in_budget", lambda self, tenant: None)
    turn(engine, "small", 1)
    turn(engine, "small", 2)
    with pytest.raises(AssertionError, match="beyond its budget"):
        turn(engine, "small", 3)
