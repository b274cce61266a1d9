"""The contract between scheduler and runner: a whole plan passes, and each invariant broken alone is named."""

from __future__ import annotations

import gc
import weakref
from array import array
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cascade_llm.errors import PlanError
from cascade_llm.plan import (
    CascadePlan,
    CascadeReport,
    IntColumn,
    LaneStart,
    PageCopy,
    StepPlan,
    StepResult,
    Tier,
    int_column,
)
from cascade_llm.sampling_params import SamplingParams
from tests.plan_cases import DRAWN, level_of, sequence_lists, step_of

PAGE_SIZE = 4


@pytest.fixture
def step() -> StepPlan:
    return step_of(DRAWN, PAGE_SIZE)


def with_levels(step: StepPlan, *levels: Any) -> StepPlan:
    return replace(step, cascades=(replace(step.cascade, levels=levels),))


def edited(column: IntColumn, index: int, value: int) -> IntColumn:
    values = list(column)
    values[index] = value
    return int_column(values)


# columns


def test_column_is_a_read_only_view_that_takes_an_array_over() -> None:
    owned = array("i", [1, 2, 3])
    column = int_column(owned)
    assert column.obj is owned
    assert list(int_column(range(3))) == [0, 1, 2]
    with pytest.raises(TypeError):
        column[0] = 5


def test_column_of_another_type_is_refused() -> None:
    with pytest.raises(PlanError, match=r"int32.*'q'"):
        int_column(array("q", [1]))


def test_column_refuses_what_int32_cannot_hold() -> None:
    with pytest.raises(OverflowError):
        int_column([2**31])


# a whole plan


def test_the_plan_that_architecture_md_draws(step: StepPlan, repo_root: Path) -> None:
    step.check([[0, 1, 2], [0, 1, 3], [5, 6]])
    rows = []
    for name, level in zip(("level 0", "leaf"), step.cascade.levels, strict=True):
        columns = (level.qo_indptr, level.kv_page_indptr, level.kv_page_indices, level.kv_last_page_len)
        rows.append("| " + " | ".join([name, *(" ".join(map(str, column)) for column in columns)]) + " |")
    text = (repo_root / "claude_docs" / "architecture.md").read_text(encoding="utf-8")
    for row in rows:
        assert row in text
    read = [[level.kv_len(i, PAGE_SIZE) for i in range(level.num_segments)] for level in step.cascade.levels]
    assert read == [[8, 0], [2, 1, 7]]


def test_shape_of_a_plan(step: StepPlan) -> None:
    plan = step.cascade
    assert (plan.num_rows, step.num_rows, step.num_sequences) == (3, 3, 3)
    assert plan.leaf is plan.levels[-1]
    assert plan.shared_levels == plan.levels[:-1]
    assert (plan.levels[0].num_segments, plan.levels[0].num_rows) == (2, 3)
    assert plan.levels[0].rows(0) == range(2)
    assert list(plan.levels[0].pages(0)) == [0, 1]
    assert list(plan.levels[0].pages(1)) == []


def test_an_idle_step_is_whole() -> None:
    empty = int_column(())
    plan = CascadePlan((level_of([]),), PAGE_SIZE)
    idle = StepPlan(
        step_id=0,
        cascades=(plan,),
        token_ids=empty,
        positions=empty,
        slots=empty,
        sequence_lanes=empty,
        sequence_epochs=empty,
    )
    idle.check([])
    assert idle.num_rows == 0


@given(data=st.data(), page_size=st.sampled_from([1, 2, 5, 16]))
def test_generated_plans_are_whole(data: st.DataObject, page_size: int) -> None:
    sequences = data.draw(sequence_lists(page_size))
    step = step_of(sequences, page_size)
    tables = [sequence.page_table for sequence in sequences]
    step.check(tables)
    step.check()
    plan = step.cascade
    assert [plan.page_table(i) for i in range(len(sequences))] == tables
    for path, table in zip(plan.paths(), tables, strict=True):
        met = [page for level, segment in zip(plan.levels, path, strict=True) for page in level.pages(segment)]
        assert met == table


@given(data=st.data())
def test_exactness_finds_any_other_page_table(data: st.DataObject) -> None:
    sequences = data.draw(sequence_lists(PAGE_SIZE))
    step = step_of(sequences, PAGE_SIZE)
    tables = [sequence.page_table for sequence in sequences]
    index = data.draw(st.integers(0, len(tables) - 1))
    entry = data.draw(st.integers(0, len(tables[index]) - 1))
    tables[index][entry] += 1000
    with pytest.raises(PlanError, match=f"sequence {index} meets pages"):
        step.check(tables)


@given(data=st.data())
def test_dropping_a_shared_page_is_found_without_page_tables(data: st.DataObject) -> None:
    sequences = data.draw(sequence_lists(PAGE_SIZE))
    step = step_of(sequences, PAGE_SIZE)
    shared = [(d, i) for d, level in enumerate(step.cascade.shared_levels) for i in range(level.num_segments)]
    filled = [(d, i) for d, i in shared if len(step.cascade.levels[d].pages(i))]
    assume(filled)
    depth, segment = data.draw(st.sampled_from(filled))
    level = step.cascade.levels[depth]
    segments = [
        (len(level.rows(i)), list(level.pages(i)), level.kv_last_page_len[i]) for i in range(level.num_segments)
    ]
    rows, pages, last = segments[segment]
    segments[segment] = (rows, pages[:-1], last if len(pages) > 1 else 0)
    levels = list(step.cascade.levels)
    levels[depth] = level_of(segments)
    with pytest.raises(PlanError, match="earlier tokens"):
        with_levels(step, *levels).check()


# levels, broken one at a time

SHARED = [(2, (0, 1), 4), (1, (), 0)]
LEAF = [(1, (2,), 2), (1, (3,), 1), (1, (5, 6), 3)]

BROKEN_LEVELS: list[tuple[str, dict[str, Any], str]] = [
    ("shared", {"qo_indptr": [0, 2, 3]}, "qo_indptr must be a read-only int32 view"),
    ("shared", {"kv_page_indices": memoryview(array("i", [0, 1]))}, "kv_page_indices must be a read-only"),
    ("leaf", {"kv_last_page_len": memoryview(array("q", [2, 1, 3])).toreadonly()}, "kv_last_page_len must be"),
    ("shared", {"qo_indptr": int_column([1, 2, 3])}, "qo_indptr must start with 0"),
    ("leaf", {"qo_indptr": int_column([])}, "qo_indptr must start with 0"),
    ("leaf", {"kv_page_indptr": int_column([1, 1, 2, 4])}, "kv_page_indptr must start with 0"),
    ("shared", {"qo_indptr": int_column([0, 4, 3])}, "qo_indptr must not decrease"),
    ("leaf", {"kv_page_indptr": int_column([0, 2, 1, 4])}, "kv_page_indptr must not decrease"),
    ("shared", {"kv_page_indptr": int_column([0, 2])}, "same segments"),
    ("leaf", {"kv_last_page_len": int_column([2, 1])}, "same segments"),
    ("leaf", {"kv_page_indices": int_column([2, 3, 5])}, "end at the length of kv_page_indices"),
    ("leaf", {"kv_page_indices": int_column([2, 3, 5, -1])}, "negative page id"),
    ("leaf", {"kv_last_page_len": int_column([2, 0, 3])}, "segment 1: kv_last_page_len 0 does not fit"),
    ("leaf", {"kv_last_page_len": int_column([2, 5, 3])}, "segment 1: kv_last_page_len 5 does not fit"),
    ("shared", {"kv_last_page_len": int_column([4, 4])}, "segment 1: kv_last_page_len 4 does not fit"),
    ("shared", {"kv_last_page_len": int_column([3, 0])}, "segment 0: its last page holds 3 tokens.*fullness"),
    ("shared", {"qo_indptr": int_column([0, 2, 4])}, r"covers 3 rows, level 0 4 \(partition\)"),
    ("shared", {"qo_indptr": int_column([0, 3, 3])}, r"segment 1 has no rows.*\(partition\)"),
    ("leaf", {"qo_indptr": int_column([0, 1, 1, 3])}, r"level 1: row 2 ends a segment above.*\(refinement\)"),
    ("leaf", {"qo_indptr": int_column([0, 0, 2, 3])}, "leaf segment 0 has no rows"),
    ("leaf", {"kv_page_indices": int_column([2, 3, 5, 5])}, r"sequence 2 meets a page twice \(exactness\)"),
    ("leaf", {"kv_page_indices": int_column([1, 3, 5, 6])}, r"sequence 0 meets a page twice \(exactness\)"),
]


@pytest.mark.parametrize(("which", "columns", "words"), BROKEN_LEVELS)
def test_broken_level_is_named(step: StepPlan, which: str, columns: dict[str, Any], words: str) -> None:
    shared, leaf = level_of(SHARED), level_of(LEAF)
    with_levels(step, shared, leaf).check()
    broken = (replace(shared, **columns), leaf) if which == "shared" else (shared, replace(leaf, **columns))
    with pytest.raises(PlanError, match=words):
        with_levels(step, *broken).cascade.check()


def test_message_names_the_level(step: StepPlan) -> None:
    shared, leaf = level_of(SHARED), level_of(LEAF)
    for levels, depth in (
        ((replace(shared, qo_indptr=int_column([1])), leaf), 0),
        ((shared, level_of([(9, (2,), 9)])), 1),
    ):
        with pytest.raises(PlanError, match=f"^level {depth}: "):
            with_levels(step, *levels).cascade.check()


def test_causality_needs_the_new_tokens_in_the_leaf() -> None:
    plan = CascadePlan((level_of([(6, (0, 1), 1)]),), PAGE_SIZE)
    with pytest.raises(PlanError, match=r"leaf segment 0 holds 5 tokens for 6 new ones \(causality\)"):
        plan.check()
    CascadePlan((level_of([(5, (0, 1), 1)]),), PAGE_SIZE).check()


def test_a_leaf_without_pages_breaks_causality() -> None:
    with pytest.raises(PlanError, match="causality"):
        CascadePlan((level_of([(1, (), 0)]),), PAGE_SIZE).check()


def test_refinement_is_checked_between_shared_levels() -> None:
    leaf = [(1, (10 + i,), 1) for i in range(4)]
    coarse, crossing = [(2, (0,), 4), (2, (1,), 4)], [(1, (2,), 4), (2, (3,), 4), (1, (4,), 4)]
    with pytest.raises(PlanError, match=r"level 1: row 2 .*\(refinement\)"):
        CascadePlan((level_of(coarse), level_of(crossing), level_of(leaf)), PAGE_SIZE).check()


def test_page_tables_must_be_one_per_sequence(step: StepPlan) -> None:
    with pytest.raises(PlanError, match="2 page tables for 3 sequences"):
        step.cascade.check([[0, 1, 2], [0, 1, 3]])


@pytest.mark.parametrize(
    ("change", "words"), [({"page_size": 0}, "page_size is 0"), ({"levels": ()}, "at least the leaf level")]
)
def test_plan_needs_a_page_size_and_a_level(step: StepPlan, change: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        replace(step.cascade, **change).check()


# steps, broken one at a time

LANE_START = LaneStart(
    lane=10,
    epoch=1,
    params=SamplingParams(),
    seed=0,
    sample_index=0,
    prompt_token_ids=(1, 2),
    output_token_ids=(),
    ending_token_ids=frozenset(),
)

BROKEN_STEPS: list[tuple[Callable[[StepPlan], dict[str, Any]], str]] = [
    (lambda s: {"cascades": ()}, "a step needs the cascade"),
    (lambda s: {"cascades": (s.cascade, s.cascade)}, "each must be shorter than the one before"),
    (lambda s: {"cascades": (replace(s.cascade, window_len=100), s.cascade)}, "each must be shorter"),
    (lambda s: {"cascades": (replace(s.cascade, window_len=0),)}, "1 or more"),
    (lambda s: {"cascades": (replace(s.cascade, window_len=8),)}, "shares pages outside its window of 8"),
    (lambda s: {"token_ids": int_column([1, 2])}, "covers 3 rows, the step has 2"),
    (lambda s: {"sequence_lanes": int_column([1, 2])}, "3 leaf segments for 2 sequences"),
    (lambda s: {"token_ids": [1, 2, 3]}, "token_ids must be a read-only int32 view"),
    (lambda s: {"sample_lanes": memoryview(array("i", [10, 11, 12]))}, "sample_lanes must be a read-only"),
    (lambda s: {"positions": int_column([9])}, "columns over rows differ in length"),
    (lambda s: {"lane_rows": int_column([0, 1])}, "columns over lane inputs differ"),
    (lambda s: {"sequence_epochs": int_column([1])}, "columns over sequences differ"),
    (lambda s: {"sample_lanes": int_column([1])}, "columns over samples differ"),
    (lambda s: {"prompt_logprob_rows": int_column([0])}, "columns over prompt logprobs differ"),
    (lambda s: {"lane_rows": int_column([3])}, "lane_rows names a row outside the step"),
    (lambda s: {"sample_rows": edited(s.sample_rows, 0, -1)}, "sample_rows names a row outside"),
    (
        lambda s: {name: int_column([5]) for name in vars_of(s, "prompt_logprob")},
        "prompt_logprob_rows names a row outside",
    ),
    (lambda s: {"sequence_lanes": int_column([10, 11, 10])}, "two sequences of a step are in one lane"),
    (lambda s: {"sample_lanes": int_column([10, 11, 10])}, "a lane is sampled twice"),
    (
        lambda s: {"sample_positions": edited(s.sample_positions, 1, 12)},
        "row 1 has position 8, the token drawn from it 12",
    ),
    (lambda s: {"lane_starts": (LANE_START, LANE_START)}, "two sequences enter one lane"),
    (lambda s: {"page_copies": (PageCopy(0, 9), PageCopy(1, 9))}, "a page is copied to twice"),
    (lambda s: {"layer_kinds": (0, 1)}, r"layer_kinds names kinds \[0, 1\], there are 1"),
    (lambda s: {"sample_mask_rows": int_column([0, -1])}, "2 sample_mask_rows for 3 samples"),
    (lambda s: {"sample_mask_rows": int_column([0, -1, -1])}, "names a row outside token_bitmasks"),
    (lambda s: {"token_bitmasks": ((1, 2),)}, "token_bitmasks must be a read-only int32 view"),
    (lambda s: {"token_bitmasks": (int_column([1]), int_column([0]))}, "token_bitmasks row 1 allows no token"),
    (lambda s: {"token_bitmasks": (int_column([1]), int_column([1, 0]))}, "row 1 .* is not as long as the first"),
    (lambda s: {"draft_samples": int_column([0])}, "columns over drafts differ in length"),
    (lambda s: {"lane_row_lanes": int_column([12])}, "row 0 takes its token from lane 12, its sequence is in lane 10"),
    (lambda s: {"slots": edited(s.slots, 1, s.slots[0])}, "two rows write one slot"),
    (lambda s: {"slots": edited(s.slots, 1, 0)}, "row 1 writes slot 0, outside its place"),
    (
        lambda s: {"positions": edited(s.positions, 0, 8), "sample_positions": edited(s.sample_positions, 0, 9)},
        "row 0 has position 8, but meets 9 earlier tokens",
    ),
]


def vars_of(step: StepPlan, prefix: str) -> list[str]:
    return [name for name in StepPlan.__dataclass_fields__ if name.startswith(prefix)]


@pytest.mark.parametrize(("change", "words"), BROKEN_STEPS)
def test_broken_step_is_named(step: StepPlan, change: Callable[[StepPlan], dict[str, Any]], words: str) -> None:
    step.check()
    with pytest.raises(PlanError, match=words):
        replace(step, **change(step)).check()


def test_a_chunk_writes_consecutive_slots_across_pages() -> None:
    chunk = DRAWN[2].__class__(nodes=(), leaf_pages=(9, 4, 7), leaf_len=11, num_new=6)
    step = step_of([chunk], PAGE_SIZE)
    step.check()
    assert list(step.positions) == [5, 6, 7, 8, 9, 10]
    assert list(step.slots) == [17, 18, 19, 28, 29, 30]
    with pytest.raises(PlanError, match="row 3 writes slot 31"):
        replace(step, slots=int_column([17, 18, 19, 31, 29, 30])).check()


def test_several_samples_may_name_one_row(step: StepPlan) -> None:
    """n > 1: the first tokens of a prompt's samples are drawn from one row, into lanes without rows of their own."""
    replace(
        step,
        sample_rows=int_column([2, 2, 2]),
        sample_lanes=int_column([12, 20, 21]),
        sample_positions=int_column([7, 7, 7]),
    ).check()


def test_pages_of_two_tiers_may_have_one_id(step: StepPlan) -> None:
    copies = (PageCopy(0, 9), PageCopy(0, 9, target_tier=Tier.HOST), PageCopy(3, 4, source_tier=Tier.HOST))
    replace(step, page_copies=copies).check()
    assert copies[0].source_tier is copies[0].target_tier is Tier.DEVICE


def test_a_mask_for_some_samples(step: StepPlan) -> None:
    words = int_column([0b101, -(2**31)])
    masked = replace(step, sample_mask_rows=int_column([-1, 0, 0]), token_bitmasks=(words,))
    masked.check()
    allowed = [32 * w + bit for w, word in enumerate(words) for bit in range(32) if word >> bit & 1]
    assert allowed == [0, 2, 63]


# kinds

TABLES = [[0, 1, 2], [0, 1, 3], [5, 6]]
WINDOWED = [(1, (1, 2), 2), (1, (1, 3), 1), (1, (5, 6), 3)]
CUT = [(2, (1,), 4), (1, (), 0)]
"""Of what A and B share, page 0 is read by each, before the shared page, and page 1 by both at once."""


def with_window(step: StepPlan, window_len: int, *levels: list[tuple[int, tuple[int, ...], int]]) -> StepPlan:
    windowed = CascadePlan(tuple(level_of(level) for level in levels), PAGE_SIZE, window_len)
    return replace(step, cascades=(step.cascade, windowed), layer_kinds=(0, 1, 1))


def test_a_windowed_kind_reads_the_end_of_what_the_first_reads(step: StepPlan) -> None:
    both = with_window(step, 5, WINDOWED)
    both.check(TABLES)
    assert [both.cascade_of(layer) for layer in range(3)] == [both.cascade, both.cascades[1], both.cascades[1]]
    assert step.cascade_of(2) is step.cascade
    with_window(step, 100, SHARED, LEAF).check(TABLES)
    cut = with_window(step, 9, CUT, [(1, (0, 2), 2), (1, (0, 3), 1), (1, (5, 6), 3)])
    cut.check(TABLES)
    assert cut.cascades[1].leaf_window_lens() == [5, 5, 9]
    assert [cut.cascades[1].page_table(i) for i in range(3)] == [[0, 1, 2], [1, 0, 3], [5, 6]], "the window hides A's 0"
    assert both.cascades[1].leaf_window_lens() == [5, 5, 5]
    assert step.cascade.leaf_window_lens() is None
    with pytest.raises(PlanError, match="covers 1 rows"):
        with_window(step, 5, WINDOWED[:1]).check()


@pytest.mark.parametrize(
    ("window_len", "levels", "words"),
    [
        (8, [SHARED, LEAF], "sequence 0 shares pages outside its window of 8"),
        (9, [SHARED, LEAF], "sequence 0 shares pages outside its window of 9"),
        (9, [CUT, [(1, (2, 0), 2), (1, (0, 3), 1), (1, (5, 6), 3)]], r"sequence 0 meets pages \[1, 2, 0\]"),
        (6, [WINDOWED], "sequence 1 meets 5 tokens, its window reaches further"),
        (5, [[(1, (0, 2), 2), *WINDOWED[1:]]], r"sequence 0 meets pages \[0, 2\], its own are \[0, 1, 2\]"),
        (5, [[*WINDOWED[:2], (1, (5, 6), 4)]], "row 2 writes slot"),
        (100, [[(1, (7, 0, 1, 2), 2), *LEAF[1:]]], "sequence 0 meets pages"),
    ],
)
def test_a_windowed_kind_that_reads_something_else(
    step: StepPlan, window_len: int, levels: list[list[tuple[int, tuple[int, ...], int]]], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        with_window(step, window_len, *levels).check(TABLES)


@given(data=st.data(), window_len=st.integers(1, 30))
def test_plain_windows_of_generated_plans_are_whole(data: st.DataObject, window_len: int) -> None:
    """Each sequence by itself, without the pages that none of its rows reaches; a page less is too few."""
    sequences = data.draw(sequence_lists(PAGE_SIZE))
    step = step_of(sequences, PAGE_SIZE)
    leaf = []
    for sequence, end_row in zip(sequences, step.cascade.leaf.qo_indptr[1:], strict=True):
        end = step.positions[end_row - 1] + 1
        first_page = max(0, end - sequence.num_new - window_len + 1) // PAGE_SIZE
        leaf.append((sequence.num_new, tuple(sequence.page_table[first_page:]), (end - 1) % PAGE_SIZE + 1))
    tables = [sequence.page_table for sequence in sequences]
    with_window(step, window_len, leaf).check(tables)
    rows, pages, last = leaf[0]
    assume(len(pages) > 1)
    leaf[0] = rows, pages[1:], last
    with pytest.raises(PlanError, match=r"its window reaches further|causality|earlier tokens"):
        with_window(step, window_len, leaf).check(tables)


# identity, records


def test_levels_and_plans_are_kept_by_identity(step: StepPlan) -> None:
    level = step.cascade.levels[0]
    twin = replace(level)
    assert twin != level
    derived = weakref.WeakKeyDictionary({level: "index tensors", twin: "others"})
    assert derived[step.cascade.levels[0]] == "index tensors"
    del twin
    gc.collect()
    assert list(derived.values()) == ["index tensors"]


def test_records_are_frozen(step: StepPlan) -> None:
    for record, name in (
        (step, "step_id"),
        (step.cascade, "page_size"),
        (step.cascade.leaf, "qo_indptr"),
        (LANE_START, "lane"),
        (CascadeReport(), "reason"),
        (StepResult(step_id=7), "token_ids"),
    ):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)


def test_report_says_what_was_saved() -> None:
    assert CascadeReport(num_levels=2, num_groups=1, kv_tokens_read=18, kv_tokens_one_level=26).kv_tokens_saved == 8
    assert CascadeReport().kv_tokens_saved == 0


RESULT = StepResult(step_id=7, token_ids=(5, 6, 7))

BROKEN_RESULTS: list[tuple[dict[str, Any], str]] = [
    ({"step_id": 6}, "a result of step 6 for the plan of step 7"),
    ({"token_ids": (5, 6)}, "2 token_ids for a plan that asks for 3"),
    ({"logprobs": (None,)}, "1 logprobs for a plan that asks for 3"),
    ({"prompt_logprobs": (None,)}, "1 prompt_logprobs for a plan that asks for 0"),
    ({"failed_samples": frozenset({1, 3})}, r"failed_samples \[1, 3\] for 3 samples"),
]


def test_result_answers_its_plan(step: StepPlan) -> None:
    RESULT.check(step)
    replace(RESULT, logprobs=(None, None, None), failed_samples=frozenset({0, 2})).check(step)


@pytest.mark.parametrize(("change", "words"), BROKEN_RESULTS)
def test_result_of_another_shape_is_named(step: StepPlan, change: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        replace(RESULT, **change).check(step)
