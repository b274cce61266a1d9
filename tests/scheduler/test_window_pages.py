"""Where all attention kinds have windows, pages that these have left behind are not held."""

from __future__ import annotations

import pytest

from tests.scheduler.simulated_engine import SimulatedEngine, small_config

PROMPT = list(range(1000, 1160))
"""40 pages"""


def windowed_engine(lag: int = 0, **changes: object) -> SimulatedEngine:
    """Pages of 4, windows of 16 and 8, a pool of one longest sequence."""
    options = {"attention_kinds": (16, 8), "layer_kinds": (0, 1), "max_num_batched_tokens": 24, "max_model_len": 256}
    return SimulatedEngine(small_config(**{**options, **changes}), lag=lag)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_long_sequence_holds_what_its_widest_window_reaches(lag: int) -> None:
    engine = windowed_engine(lag)
    engine.add(PROMPT, max_tokens=80)
    held = []
    while engine.scheduler.has_unfinished:
        engine.step()
        held.append(engine.scheduler.page_counts.held_pages)
    engine.check_outputs()
    window, chunk, later = 16 // 4 + 1, 24 // 4 + 1, 3
    assert max(held) <= window + (1 + lag) * chunk + later
    assert held[-2] <= window + 1 + later
    assert engine.counters.preemptions == 0


def test_a_kind_that_reads_everything_keeps_all_pages() -> None:
    engine = windowed_engine(attention_kinds=(None, 8))
    engine.add(PROMPT, max_tokens=2)
    engine.step()
    while engine.scheduler.has_unfinished:
        held = engine.scheduler.page_counts.held_pages
        engine.step()
    assert held == 40


def test_a_prompt_is_found_by_its_last_pages() -> None:
    """Another load takes the pages of the prompt's beginning; its end is enough for who comes behind it."""
    engine = windowed_engine()
    engine.add([*PROMPT, 1], request_id="first", max_tokens=60)
    for _ in range(8):
        engine.step()
    engine.add(range(2000, 2140), max_tokens=1)
    while engine.scheduler.num_running + engine.scheduler.num_waiting > 1:
        engine.step()
    first_node = next(node for node in engine.scheduler._roster.tables.cache.nodes() if node.token_ids[0] == PROMPT[0])
    assert not first_node.pages, "it is hollow"
    engine.scheduler.abort("first")
    before = engine.counters.cached_tokens
    engine.add([*PROMPT, 1, 2, 3], request_id="second", max_tokens=3)
    engine.run()
    del engine.requests["first"]
    engine.check_outputs()
    assert engine.counters.cached_tokens - before == 160


def test_text_that_was_hollow_is_there_again_once_it_was_computed() -> None:
    engine = windowed_engine()
    for _ in range(2):
        engine.add(PROMPT, max_tokens=2)
        engine.run()
        for i in range(3):
            engine.add(range(2000 + 200 * i, 2140 + 200 * i), max_tokens=1)
        engine.run()
    engine.add(PROMPT, max_tokens=2)
    engine.add([*PROMPT[:80], 7], max_tokens=2)
    engine.run()
    engine.check_outputs()


def test_several_long_sequences_fit_a_pool_that_could_not_hold_them_whole() -> None:
    """Four of 60 pages each; the pool has 64, and nobody is preempted."""
    engine = windowed_engine(max_num_batched_tokens=32)
    for i in range(4):
        engine.add([*PROMPT, i], max_tokens=80)
    engine.run()
    engine.check_outputs()
    assert engine.counters.preemptions == 0
