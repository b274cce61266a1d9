"""Sessions: what they hold between turns, and when they give it up."""

from __future__ import annotations

import pytest

from cascade_llm.scheduler.sequence import Client
from cascade_llm.scheduler.sessions import MOST_SESSIONS, SessionLimits, SessionName, SessionUse
from tests.scheduler.simulated_engine import SimulatedEngine, small_config


class Clock:
    """Time as the test sets it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def use(session_id: str, fork_of: str | None = None, *, drop_on_abort: bool = False) -> SessionUse:
    return SessionUse(session_id=session_id, fork_of=fork_of, drop_on_abort=drop_on_abort)


def turn(engine: SimulatedEngine, session: SessionUse | None, prompt: list[int]) -> list[int]:
    """Run a request to its end; returns its text."""
    request_id = engine.add(prompt, session=session)
    engine.run()
    engine.check_outputs()
    return [*prompt, *engine.outputs[request_id, 0].token_ids]


def text(name: int, num_tokens: int = 13) -> list[int]:
    return [1000 * name + i for i in range(num_tokens)]


def held(engine: SimulatedEngine) -> dict[str, int]:
    return {info.session_id: info.num_pages for info in engine.scheduler.sessions.infos()}


def fill_cache(engine: SimulatedEngine, num_requests: int = 20) -> None:
    for name in range(100, 100 + num_requests):
        turn(engine, None, text(name))


def cached_tokens(engine: SimulatedEngine) -> int:
    return int(engine.counters.cached_tokens)


def test_pages_of_a_session_outlive_what_empties_the_cache() -> None:
    engine = SimulatedEngine(small_config(total_pages=32))
    spoken = turn(engine, use("talk"), text(1))
    fill_cache(engine)
    assert held(engine) == {"talk": 4}, "the last of 17 tokens has no K/V: 16 are 4 pages"
    before = cached_tokens(engine)
    turn(engine, use("talk"), [*spoken, 7, 8])
    assert cached_tokens(engine) - before == 16
    assert held(engine) == {"talk": 5}


def test_without_a_session_the_cache_alone_serves() -> None:
    engine = SimulatedEngine(small_config(total_pages=32))
    spoken = turn(engine, None, text(1))
    assert engine.scheduler.page_counts.held_pages == 0
    fill_cache(engine)
    before = cached_tokens(engine)
    turn(engine, None, [*spoken, 7])
    assert cached_tokens(engine) == before


def test_budget_gives_up_the_least_recently_used() -> None:
    engine = SimulatedEngine(small_config(total_pages=32))
    engine.scheduler.limit_sessions(SessionLimits(share=0.26))  # 8 pages: two sessions of 4
    spoken = [turn(engine, use(name), text(i)) for i, name in enumerate("ab", 1)]
    engine.add([*spoken[0][:9], 5], session=use("a"))  # "a" is used again: "b" is the oldest
    engine.run()
    turn(engine, use("c"), text(3))
    assert list(held(engine)) == ["a", "c"]
    assert engine.scheduler.page_counts.session_pages <= 8


def test_session_beyond_the_budget_is_not_held_but_cached() -> None:
    engine = SimulatedEngine(small_config(total_pages=32))
    engine.scheduler.limit_sessions(SessionLimits(share=0.13))  # 4 pages
    turn(engine, use("other"), text(2))
    spoken = turn(engine, use("talk"), text(1, 20))
    assert held(engine) == {"other": 4}, "nobody else is given up for it"
    before = cached_tokens(engine)
    turn(engine, use("talk"), [*spoken, 7])
    assert cached_tokens(engine) - before == 20


def test_smaller_limits_hold_at_once() -> None:
    engine = SimulatedEngine()
    turn(engine, use("talk"), text(1))
    engine.scheduler.limit_sessions(SessionLimits(share=0.0))
    assert engine.scheduler.page_counts.held_pages == 0


def test_time_to_live_counts_from_the_last_use() -> None:
    clock = Clock()
    engine = SimulatedEngine(clock=clock)
    engine.scheduler.limit_sessions(SessionLimits(ttl_s=10.0))
    turn(engine, use("a"), text(1))
    turn(engine, use("b"), text(2))
    clock.now_s = 9.0
    turn(engine, use("a"), text(1))
    clock.now_s = 10.0
    assert [(info.session_id, info.idle_s) for info in engine.scheduler.sessions.infos()] == [("a", 1.0)]
    clock.now_s = 19.0
    turn(engine, None, text(3))
    assert engine.scheduler.page_counts.held_pages == 0, "a step ends it as well"


def test_fork_holds_the_same_pages_and_outlives_its_source() -> None:
    engine = SimulatedEngine(small_config(total_pages=32))
    spoken = turn(engine, use("talk"), text(1))
    engine.add([*spoken, 7], session=use("branch", fork_of="talk"))
    assert held(engine) == {"talk": 4, "branch": 4}
    assert engine.scheduler.page_counts.session_pages == 4, "the same ones"
    engine.run()
    turn(engine, use("talk"), [*spoken, *text(2, 4)])
    assert held(engine) == {"branch": 5, "talk": 6}
    assert engine.scheduler.page_counts.session_pages == 4 + 1 + 2
    assert engine.scheduler.drop_session(SessionName("", "talk"))
    fill_cache(engine)
    before = cached_tokens(engine)
    turn(engine, use("branch"), [*spoken, 7, 8])
    assert cached_tokens(engine) - before == 16


def test_fork_of_an_unknown_session_begins_empty() -> None:
    engine = SimulatedEngine()
    engine.add(text(1), session=use("branch", fork_of="nobody"))
    assert held(engine) == {}
    engine.run()
    assert held(engine) == {"branch": 4}


def test_sessions_are_given_up_before_a_request_waits() -> None:
    engine = SimulatedEngine(small_config(total_pages=32))
    engine.scheduler.limit_sessions(SessionLimits(share=1.0))
    for name in range(8):
        turn(engine, use(str(name)), text(name))
    assert engine.scheduler.page_counts.session_pages == 32
    engine.add(text(50, 60), max_tokens=4)
    assert engine.step() is not None
    assert engine.scheduler.num_running == 1
    engine.run()
    engine.check_outputs()
    assert engine.counters.preemptions == 0
    assert list(held(engine)) == ["4", "5", "6", "7"], "as many as it needed, the least recently used"


def test_sessions_are_given_up_before_a_sequence_is_preempted() -> None:
    engine = SimulatedEngine(small_config(total_pages=32))
    engine.scheduler.limit_sessions(SessionLimits(share=1.0))
    for name in range(7):
        turn(engine, use(str(name)), text(name))
    engine.add(text(50), max_tokens=60)
    engine.add(text(51), max_tokens=40)
    engine.run()
    engine.check_outputs()
    assert engine.counters.preemptions == 0


def test_sessions_stay_where_giving_them_up_would_not_help() -> None:
    engine = SimulatedEngine(small_config(total_pages=32))
    turn(engine, use("talk"), text(1))
    engine.add(text(2, 64), max_tokens=60)
    engine.step()
    engine.add(text(3, 60), max_tokens=60)
    engine.step()
    assert engine.scheduler.num_waiting == 1
    assert held(engine) == {"talk": 4}


def test_own_pages_of_a_turn_are_not_counted_as_room() -> None:
    engine = SimulatedEngine(small_config(total_pages=8, max_model_len=32))
    engine.scheduler.limit_sessions(SessionLimits(share=1.0))
    spoken = turn(engine, use("talk"), text(1))
    turn(engine, use("talk"), [*spoken, *text(2, 11)])
    assert held(engine) == {"talk": 7}, "31 of its 32 tokens have K/V"


@pytest.mark.parametrize(("drop", "kept"), [(False, {"talk": 5}), (True, {})])
def test_abort_drops_a_session_only_where_that_was_asked(drop: bool, kept: dict[str, int]) -> None:
    engine = SimulatedEngine()
    spoken = turn(engine, use("talk"), text(1))
    request_id = engine.add([*spoken, *text(2, 4)], session=use("talk", drop_on_abort=drop), max_tokens=40)
    engine.step()
    engine.scheduler.abort(request_id)
    engine.check()
    assert held(engine) == kept


def test_abort_of_a_turn_that_waits_leaves_its_session() -> None:
    engine = SimulatedEngine()
    spoken = turn(engine, use("talk"), text(1))
    engine.scheduler.abort(engine.add(spoken, session=use("talk")))
    assert held(engine) == {"talk": 4}


def test_dropped_session_does_not_come_back_with_its_running_turn() -> None:
    engine = SimulatedEngine()
    engine.add(text(1), session=use("talk"))
    engine.step()
    assert engine.scheduler.drop_session(SessionName("", "talk"))
    engine.run()
    assert held(engine) == {}
    assert not engine.scheduler.drop_session(SessionName("", "talk"))


def test_failed_steps_and_samples_leave_no_session_on_their_pages() -> None:
    engine = SimulatedEngine()
    spoken = turn(engine, use("talk"), text(1))
    engine.add([*spoken, *text(2, 8)], session=use("talk"))
    engine.schedule()
    engine.commit(frozenset([0]))
    assert held(engine) == {}
    assert engine.scheduler.page_counts.free_pages == engine.scheduler.page_counts.total_pages
    engine.add(text(1), session=use("talk"))
    engine.run()
    assert held(engine) == {"talk": 4}
    engine.add(text(3), session=use("other"))
    engine.schedule()
    engine.fail()
    assert engine.scheduler.page_counts.free_pages == engine.scheduler.page_counts.total_pages


def test_reset_and_restart_end_sessions() -> None:
    engine = SimulatedEngine()
    for end in (engine.scheduler.reset_prefix_cache, engine.scheduler.restart):
        turn(engine, use("talk"), text(1))
        end()
        assert held(engine) == {}
        assert engine.scheduler.page_counts.free_pages == engine.scheduler.page_counts.total_pages


def test_nothing_is_kept_without_a_prefix_cache() -> None:
    engine = SimulatedEngine(small_config(enable_prefix_caching=False))
    turn(engine, use("talk"), text(1))
    assert engine.scheduler.page_counts.free_pages == engine.scheduler.page_counts.total_pages


def test_number_of_sessions_is_limited_as_well() -> None:
    engine = SimulatedEngine()
    turn(engine, use("talk"), text(1))
    for number in range(MOST_SESSIONS + 3):
        request_id = engine.add(text(1), session=use(f"branch {number}", fork_of="talk"))
        engine.scheduler.abort(request_id)
    assert len(held(engine)) == MOST_SESSIONS
    assert "talk" in held(engine), "it was used by each fork"


def test_session_without_a_full_page_is_not_kept() -> None:
    engine = SimulatedEngine()
    engine.add([1], session=use("talk"), max_tokens=1)
    engine.run()
    assert held(engine) == {}


def test_a_name_is_another_session_for_each_tenant() -> None:
    engine = SimulatedEngine(small_config(total_pages=32))
    for tenant, num_tokens in (("a", 13), ("b", 17)):
        engine.add(text(1, num_tokens), session=use("talk"), client=Client(name=tenant, tenant=tenant))
        engine.run()
    sessions = engine.scheduler.sessions
    assert [info[:3] for info in sessions.infos()] == [("a", "talk", 4), ("b", "talk", 5)]
    assert (sessions.num_pages, sessions.num_pages_of("a"), sessions.num_pages_of("b")) == (9, 4, 5)
    engine.add(text(1), session=use("branch", fork_of="talk"), client=Client(name="c", tenant="c"))
    assert len(sessions.infos()) == 2, "the branch of a session of another tenant begins empty"
    engine.run()
    assert engine.scheduler.drop_session(SessionName("a", "talk"))
    assert [(info.tenant, info.session_id) for info in sessions.infos()] == [("b", "talk"), ("c", "branch")]
