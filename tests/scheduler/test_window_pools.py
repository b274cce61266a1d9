"""Attention kinds with windows in pools of their own: what they hold, what a prompt finds there, and what is copied."""

from __future__ import annotations

import pytest

from cascade_llm.config import window_pages_needed
from cascade_llm.errors import ConfigError
from cascade_llm.scheduler.sessions import SessionUse
from tests.scheduler.simulated_engine import SimulatedEngine, small_config

PROMPT = list(range(1000, 1160))
"""40 pages"""


def engine_with_pools(lag: int = 0, *, window_pages: int = 14, **changes: object) -> SimulatedEngine:
    """Pages of 4: 64 of a kind that reads everything, 14 of one with a window of 8."""
    options = {"attention_kinds": (None, 8), "layer_kinds": (0, 1), "max_model_len": 256, "max_num_batched_tokens": 24}
    return SimulatedEngine(small_config(**{**options, **changes}, window_pages=(window_pages,)), lag=lag)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_sequence_holds_all_pages_of_one_kind_and_the_last_of_the_other(lag: int) -> None:
    engine = engine_with_pools(lag)
    engine.add(PROMPT, max_tokens=60)
    held = []
    while engine.scheduler.has_unfinished:
        engine.step()
        _, (_, window) = engine.scheduler.pools
        held.append((engine.scheduler.page_counts.held_pages, window.held_pages))
    engine.check_outputs()
    assert max(pages for pages, _ in held) == 55
    assert max(pages for _, pages in held) <= window_pages_needed(8, 4, 256, 24)
    assert held[-2][1] <= 5
    assert engine.counters.preemptions == 0


def test_a_prompt_is_found_as_far_as_the_window_s_pages_are_there() -> None:
    """Another load takes the places of the window behind the prompt; the pages stay, and what is before is found."""
    engine = engine_with_pools(total_pages=128)
    engine.add(PROMPT, max_tokens=2)
    engine.run()
    engine.add([*PROMPT, 1], max_tokens=2)
    engine.run()
    assert engine.counters.cached_tokens == 160
    for i in range(3):
        engine.add(range(2000 + 100 * i, 2060 + 100 * i), max_tokens=1)
        engine.run()
    _, (_, window) = engine.scheduler.pools
    assert (window.free_pages, window.cached_pages) == (0, 14)
    assert engine.scheduler.page_counts.cached_pages >= 40
    engine.add([*PROMPT, 2], max_tokens=2)
    engine.run()
    engine.check_outputs()
    assert engine.counters.cached_tokens == 160, "nothing: no page of the prompt has a place"
    engine.add([*PROMPT, 3], max_tokens=2)
    engine.run()
    assert engine.counters.cached_tokens == 320, "the pages of the tree have places again"


def test_forks_move_on_to_pages_of_the_tree_that_have_no_place() -> None:
    engine = engine_with_pools(total_pages=128, window_pages=20)
    engine.add(PROMPT[:41], max_tokens=1)
    engine.run()
    for i in range(4):
        engine.add(range(2000 + 100 * i, 2060 + 100 * i), max_tokens=1)
        engine.run()
    for _ in range(2):
        engine.add(PROMPT[:41], max_tokens=12, n=3, temperature=1.0)
        engine.run()
    engine.check_outputs()
    assert engine.counters.copied_pages > 0


def test_a_session_keeps_the_window_of_its_next_turn() -> None:
    engine = engine_with_pools(total_pages=128)
    engine.add(PROMPT, max_tokens=5, session=SessionUse(session_id="a"))
    engine.run()
    for i in range(4):
        engine.add(range(2000 + 100 * i, 2060 + 100 * i), max_tokens=1)
        engine.run()
    _, (_, window) = engine.scheduler.pools
    assert window.session_pages in (2, 3)
    turn = [*PROMPT, *engine.outputs["r0", 0].token_ids, 7]
    engine.add(turn, max_tokens=2, session=SessionUse(session_id="a"))
    engine.run()
    assert engine.counters.cached_tokens == 164


def test_several_sequences_run_in_pools_that_hold_one_window_each() -> None:
    engine = engine_with_pools(total_pages=240, window_pages=24)
    for i in range(4):
        engine.add([*PROMPT, i], max_tokens=40)
    engine.run()
    engine.check_outputs()
    assert engine.counters.preemptions == 0


def test_a_small_pool_gives_a_prompt_fewer_rows_of_a_step() -> None:
    least = window_pages_needed(8, 4, 256, 1)
    engine = engine_with_pools(window_pages=least)
    engine.add(PROMPT, max_tokens=3)
    plans = engine.run()
    engine.check_outputs()
    assert max(plan.num_rows for plan in plans) == engine.config.most_rows_of_sequence < 8


@pytest.mark.parametrize(
    ("kinds", "pages"), [((None, 8), (3,)), ((None, 8), (65,)), ((None, 8), (20, 20)), ((8, 4), (20,))]
)
def test_pools_that_fit_no_sequence_or_no_kind_are_refused(
    kinds: tuple[int | None, ...], pages: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match="window"):
        small_config(attention_kinds=kinds, window_pages=pages)
