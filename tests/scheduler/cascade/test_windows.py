"""Attention kinds with a window: they share what is shared at all, as far as it lies inside their windows.

That each row meets what its window reaches, and nothing is shared outside it, is what `StepPlan.check` asserts of every
plan that a `SimulatedEngine` makes.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from cascade_llm.config import SchedulerConfig, kinds_of_layers
from cascade_llm.errors import ConfigError
from cascade_llm.plan import CascadePlan, StepPlan
from cascade_llm.scheduler.cascade.windows import MOST_ROWS
from tests.scheduler.simulated_engine import SimulatedEngine, small_config

SYSTEM = list(range(16))


def decode_steps(*window_lens: int, prompts: int = 4) -> tuple[SimulatedEngine, list[StepPlan]]:
    """Prompts of 16 common tokens and 2 of their own, 12 tokens more; pages of 4."""
    return steps_of((None, *window_lens), prompts)


def steps_of(kinds: tuple[int | None, ...], prompts: int = 4) -> tuple[SimulatedEngine, list[StepPlan]]:
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


def test_what_a_window_cuts_is_read_by_leaves_and_the_rest_is_shared() -> None:
    """16 common tokens, a window of 24: while a sequence has 24 at most, all four pages are shared; then the leaf takes
    the pages that the window has reached, a page ahead of it."""
    _, plans = decode_steps(24)
    for plan in plans[1:]:
        end = plan.positions[0] + 1
        full, windowed = plan.cascades
        (segment,) = shared(full)[0]
        assert len(segment) == 4
        first_inside = -(-max(0, end - 24) // 4)
        (kept,) = shared(windowed)[0]
        assert kept == segment[-len(kept) :]
        assert 4 - len(kept) in ((0,) if end <= 24 else (first_inside, first_inside + 1))
    assert plans[0].layer_kinds is plans[-1].layer_kinds


def test_a_sequence_ahead_of_the_others_takes_pages_from_their_segment() -> None:
    """Three have four pages in common, and two a fifth; the window of the third begins in page 1."""
    engine = SimulatedEngine(small_config(attention_kinds=(None, 28)))
    for i in range(2):
        engine.add([*SYSTEM, 50, 51, 52, 53, 100 + i], max_tokens=6)
    engine.add([*SYSTEM, *range(60, 75)], max_tokens=8)
    engine.step()
    plan = engine.step()
    assert plan is not None
    full, windowed = plan.cascades
    assert [len(segment) for level in shared(full) for segment in level if segment] == [4, 1]
    assert [len(segment) for level in shared(windowed) for segment in level if segment] == [2, 1]
    assert tokens_read(windowed) == tokens_read(full) + 4 * (5 - 2), "pages 0 and 1 are read five times, not twice"
    engine.run()
    engine.check_outputs()


def test_a_prefix_longer_than_the_window_is_shared_in_its_tail() -> None:
    """Only windowed layers: 48 common tokens, a window of 16. Each decode step reads the shared tail once."""
    engine = SimulatedEngine(small_config(attention_kinds=(16,)))
    prompt = list(range(48))
    for i in range(6):
        engine.add([*prompt, 100 + i], max_tokens=8)
    plans = engine.run()
    engine.check_outputs()
    decode = [plan for plan in plans if plan.num_rows == plan.num_sequences == 6]
    assert len(decode) >= 6
    for plan in decode:
        (segment,) = shared(plan.cascade)[0]
        assert 1 <= len(segment) <= 3
        assert plan.report.kv_tokens_saved == 5 * 4 * len(segment)


@pytest.mark.parametrize(("own", "num_sharers"), [(MOST_ROWS - 8, 3), (MOST_ROWS + 8, 2)])
def test_many_rows_of_a_sequence_that_the_window_cuts_share_nothing(own: int, num_sharers: int) -> None:
    """A long chunk beside two decode rows, behind 640 common tokens."""
    engine = SimulatedEngine(
        small_config(attention_kinds=(512,), max_num_batched_tokens=700, max_model_len=1024, total_pages=512)
    )
    for i in range(2):
        engine.add([*range(640), 2000 + i], max_tokens=4)
    engine.step()
    engine.step()
    engine.add([*range(640), *range(3000, 3000 + own)], max_tokens=2)
    plan = engine.step()
    assert plan is not None
    ((rows, pages),) = [
        (level.rows(i), level.pages(i))
        for level in plan.cascade.shared_levels
        for i in range(level.num_segments)
        if len(level.pages(i))
    ]
    assert len([end for end in plan.cascade.leaf.qo_indptr[1:] if end - 1 in rows]) == num_sharers
    assert 0 < len(pages) < 160
    engine.run()
    engine.check_outputs()


def test_a_sequence_whose_window_has_left_the_prefix_leaves_it_to_the_others() -> None:
    engine = SimulatedEngine(small_config(attention_kinds=(24,)))
    engine.add([*SYSTEM, *range(60, 90)], max_tokens=6)
    for i in range(2):
        engine.add([*SYSTEM, 100 + i], max_tokens=6)
    plans = engine.run()
    engine.check_outputs()
    decode = [plan for plan in plans if plan.num_rows == plan.num_sequences == 3]
    assert len(decode) > 3
    for plan in decode:
        assert (plan.report.num_groups, plan.report.grouped_rows) == (1, 2)


def test_levels_of_a_window_last_for_a_page_of_steps() -> None:
    _, plans = decode_steps(24)
    kept = [a.cascades[1].shared_levels == b.cascades[1].shared_levels for a, b in pairwise(plans[1:])]
    assert kept.count(False) == 1, "when they outgrow it"


def test_several_windows() -> None:
    _, plans = decode_steps(100, 24, 7, 1)
    assert [cascade.window_len for cascade in plans[-1].cascades] == [None, 100, 24, 7, 1]
    read = [tokens_read(cascade) for cascade in plans[-1].cascades]
    assert max(read) < 2 * read[0]
    assert read[-1] < 4 * 2 * 4
    assert plans[-1].report.kv_tokens_read == sum(read) // 5


def test_decode_steps_of_windows_are_made_from_the_one_before() -> None:
    """But for one in a page, where windows have moved on."""
    for kinds in ((None, 24), (24,), (None, 24, 7), (20, 5)):
        _, plans = steps_of(kinds)
        made = [after.positions is before.sample_positions for before, after in pairwise(plans[1:])]
        assert len(made) == 11
        assert sum(made) >= 7


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
        ({"attention_kinds": ()}, "each shorter than the one before"),
        ({"attention_kinds": (8, None)}, "each shorter than the one before"),
        ({"attention_kinds": (None, 0)}, "windows of 1 or more tokens"),
        ({"attention_kinds": (-1,)}, "windows of 1 or more tokens"),
        ({"attention_kinds": (None, None)}, "each shorter than the one before"),
        ({"attention_kinds": (None, 4, 8)}, "each shorter than the one before"),
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


def test_kinds_of_layers_has_the_widest_first() -> None:
    assert kinds_of_layers([None, None]) == ((None,), ())
    assert kinds_of_layers([7, 7]) == ((7,), ())
    assert kinds_of_layers([512, None, 512]) == ((None, 512), (1, 0, 1))
    assert kinds_of_layers([4, 9, None, 4]) == ((None, 9, 4), (2, 1, 0, 2))
