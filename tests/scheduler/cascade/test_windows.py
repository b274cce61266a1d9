"""Attention kinds with a window: they share what the first kind shares, as long as their sequences fit the window.

That each row meets what its window reaches, and nothing is shared outside it, is what `StepPlan.check` asserts of every
plan that a `SimulatedEngine` makes.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from cascade_llm.config import SchedulerConfig
from cascade_llm.errors import ConfigError
from cascade_llm.plan import CascadePlan, StepPlan
from tests.scheduler.simulated_engine import SimulatedEngine, small_config

SYSTEM = list(range(16))


def decode_steps(*window_lens: int, prompts: int = 4) -> tuple[SimulatedEngine, list[StepPlan]]:
    """Prompts of 16 common tokens and 2 of their own, 12 tokens more; pages of 4."""
    kinds = (None, *window_lens)
    engine = SimulatedEngine(small_config(attention_kinds=kinds, layer_kinds=tuple(range(len(kinds)))))
    for i in range(prompts):
        engine.add([*SYSTEM, 100 + i, 200 + i], max_tokens=13)
    plans = engine.run()
    engine.check_outputs()
    return engine, plans


def shared(cascade: CascadePlan) -> list[list[list[int]]]:
    return [[list(level.pages(i)) for i in range(level.num_segments)] for level in cascade.shared_levels]


def tokens_read(cascade: CascadePlan) -> int:
    return sum(level.kv_len(i, cascade.page_size) for level in cascade.levels for i in range(level.num_segments))


def test_a_window_that_holds_everything_shares_all_the_same() -> None:
    for plan in decode_steps(100)[1]:
        full, windowed = plan.cascades
        assert windowed.window_len == 100
        assert shared(windowed) == shared(full)
        assert tokens_read(windowed) == tokens_read(full)


def test_a_sequence_reads_its_last_pages_once_it_is_longer_than_the_window() -> None:
    _, plans = decode_steps(24)
    for plan in plans[1:]:
        end = plan.positions[0] + 1
        full, windowed = plan.cascades
        assert shared(full)
        assert bool(shared(windowed)) == (end <= 24)
        if end > 24:
            assert [windowed.leaf.kv_len(i, 4) for i in range(4)] == [end - (end - 24) // 4 * 4] * 4
    assert plans[0].layer_kinds is plans[-1].layer_kinds


def test_one_long_sequence_among_short_ones_takes_the_segments_above_it_away() -> None:
    """Four share 16 tokens, of which two share 4 more; with a third that outgrows the window, these two still do."""
    engine = SimulatedEngine(small_config(attention_kinds=(None, 28)))
    for i in range(2):
        engine.add([*SYSTEM, 50, 51, 52, 53, 100 + i], max_tokens=6)
    engine.add([*SYSTEM, *range(60, 75)], max_tokens=8)
    engine.step()
    plan = engine.step()
    assert plan is not None
    full, windowed = plan.cascades
    assert [len(segment) for level in shared(full) for segment in level if segment] == [4, 1]
    (level,) = shared(windowed)
    assert [len(segment) for segment in level] == [5, 0], "the first segment's pages come with the second's"
    engine.run()
    engine.check_outputs()


def test_levels_of_a_window_last_while_its_sequences_fit() -> None:
    _, plans = decode_steps(24)
    kept = [a.cascades[1].shared_levels == b.cascades[1].shared_levels for a, b in pairwise(plans[1:])]
    assert kept.count(False) == 1, "once, when they outgrow it"


def test_several_windows() -> None:
    _, plans = decode_steps(1, 7, 24, 100)
    assert [cascade.window_len for cascade in plans[-1].cascades] == [None, 1, 7, 24, 100]
    assert [tokens_read(cascade) // 4 for cascade in plans[-1].cascades[1:4]] == sorted(
        tokens_read(cascade) // 4 for cascade in plans[-1].cascades[1:4]
    )


def test_windows_with_drafts_and_chunks() -> None:
    config = small_config(attention_kinds=(None, 5), max_num_batched_tokens=12)
    for lag in (0, 1):
        engine = SimulatedEngine(config, lag=lag, drafts=True)
        for i in range(3):
            engine.add([*SYSTEM, *range(100 * i, 100 * i + 9 + i)], max_tokens=12, n=2, temperature=1.0)
        plans = engine.run()
        engine.check_outputs()
        assert any(len(plan.draft_lens) for plan in plans)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_kinds": ()}, "must be None and then windows"),
        ({"attention_kinds": (8,)}, "must be None and then windows"),
        ({"attention_kinds": (None, 0)}, "must be None and then windows"),
        ({"attention_kinds": (None, None)}, "must be None and then windows"),
        ({"layer_kinds": (0, 1)}, r"layer_kinds is \(0, 1\): there are 1 attention kinds"),
    ],
)
def test_kinds_that_make_no_sense(options: dict[str, tuple[int | None, ...]], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        small_config(**options)


def test_without_kinds_there_is_one_plan() -> None:
    config: SchedulerConfig = small_config()
    engine = SimulatedEngine(config)
    engine.add(SYSTEM)
    assert all(len(plan.cascades) == 1 and plan.layer_kinds == () for plan in engine.run())
