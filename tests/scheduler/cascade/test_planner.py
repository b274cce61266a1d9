"""Cascade plans of whole steps: right for any load, kept while nothing changes, and with a reason where none is made.

Every plan that a `SimulatedEngine` makes has passed `StepPlan.check` with the true page tables, and its report has been
worked out again from its segments.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from cascade_llm.config import CascadeConfig
from cascade_llm.plan import CascadePlan, StepPlan
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS
from tests.scheduler.generated import generated_steps
from tests.scheduler.simulated_engine import SimulatedEngine, small_config

SYSTEM = list(range(8))


def engine_of(cascade: CascadeConfig) -> SimulatedEngine:
    return SimulatedEngine(small_config(cascade=cascade))


def pages_by_level(plan: CascadePlan) -> list[list[list[int]]]:
    return [[list(level.pages(i)) for i in range(level.num_segments)] for level in plan.levels]


def is_decode(plan: StepPlan) -> bool:
    return plan.num_rows == plan.num_sequences


def test_plans_of_more_than_a_thousand_batches() -> None:
    kinds, num_plans = set[object](), 0
    for seed in range(170):
        for plan, page_tables in generated_steps(seed, 10):
            plan.check(page_tables)
            num_plans += 1
            most_rows = max(len(plan.cascade.leaf.rows(i)) for i in range(plan.num_sequences))
            kinds.add("decode" if is_decode(plan) else "mixed" if most_rows < plan.num_rows else "prefill")
            kinds.add(plan.report.num_levels)
            kinds.add(plan.report.reason)
            kinds |= {name for name in ("page_copies", "lane_rows", "prompt_logprob_rows") if len(getattr(plan, name))}
    assert num_plans == 1700
    assert {1, 2, 3, 4, "decode", "mixed", "prefill", "page_copies", "lane_rows", "prompt_logprob_rows"} <= kinds
    assert {None, "one sequence", "cascade attention is off", "the cost model expects no gain"} <= kinds
    assert "no two sequences share a full page" in kinds


def test_generated_steps_are_the_same_each_time() -> None:
    first, second = list(generated_steps(5, 20)), list(generated_steps(5, 20))
    assert [tables for _, tables in first] == [tables for _, tables in second]
    assert [list(plan.slots) for plan, _ in first] == [list(plan.slots) for plan, _ in second]
    assert [list(plan.token_ids) for plan, _ in first] == [list(plan.token_ids) for plan, _ in second]


def test_a_step_that_changes_nothing_keeps_the_levels() -> None:
    engine = SimulatedEngine()
    for own in ([100], [101, 102], [103, 104, 105]):
        engine.add(SYSTEM + own, max_tokens=12)
    engine.add([7, 7], max_tokens=12)
    plans = engine.run()
    assert [is_decode(plan) for plan in plans] == [False] + [True] * 11
    assert plans[1].cascade.shared_levels[0] is not plans[0].cascade.shared_levels[0], "the leader had 9 rows"
    num_kept = 0
    for before, plan in pairwise(plans[1:]):
        assert len(plan.cascade.levels) == 2
        assert plan.cascade.levels[0] is before.cascade.levels[0]
        leaf, leaf_before = plan.cascade.leaf, before.cascade.leaf
        assert leaf is not leaf_before
        if any(position % 4 == 0 for position in plan.positions):
            assert leaf.kv_page_indices is not leaf_before.kv_page_indices
        else:
            num_kept += 1
            for name in ("qo_indptr", "kv_page_indptr", "kv_page_indices"):
                assert getattr(leaf, name) is getattr(leaf_before, name)
    assert num_kept == 2, "one of the four begins a page in most steps"


def test_levels_are_kept_while_samples_grow_apart() -> None:
    engine = SimulatedEngine()
    engine.add(SYSTEM, n=3, max_tokens=30)
    plans = engine.run()[1:]
    assert len({id(plan.cascade.levels[0]) for plan in plans}) == 1
    assert pages_by_level(plans[-1].cascade)[0] == [[0, 1]]


def test_levels_are_new_when_somebody_comes_or_goes() -> None:
    engine = SimulatedEngine()
    first, second, third = (engine.add([*SYSTEM, own], max_tokens=50) for own in (100, 101, 102))
    engine.step()
    levels = [engine.step().cascade.levels[0]]
    engine.scheduler.abort(second)
    levels.append(engine.step().cascade.levels[0])
    assert list(levels[1].qo_indptr) == [0, 2]
    engine.add([*SYSTEM, 103], max_tokens=50)
    engine.step()
    levels.append(engine.step().cascade.levels[0])
    assert list(levels[2].qo_indptr) == [0, 3]
    assert len(set(map(id, levels))) == 3
    engine.scheduler.abort(first)
    engine.scheduler.abort(third)
    assert engine.step().report.reason == "one sequence"


@pytest.mark.parametrize("max_levels", [1, 2, 3, 4])
def test_as_many_levels_as_allowed(max_levels: int) -> None:
    engine = engine_of(CascadeConfig(shared_prefix_len=1, max_levels=max_levels))
    texts = [[0], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 3], [4], [4]]
    for text in texts:
        engine.add([token for page in text for token in [page] * 4] + [9], max_tokens=3)
    engine.step()
    plan = engine.step()
    assert plan is not None
    assert plan.report.num_levels == max_levels
    # 7 sequences read 1, 2, 3, 3, 3, 1, 1 full pages and two more tokens each
    assert plan.report.kv_tokens_one_level == 4 * 14 + 7 * 2
    # one level: [0] of 5 and [4]; two: [0, 1] of 4 beside; three: [0, 1, 2] of 2
    assert plan.report.kv_tokens_saved == {1: 0, 2: 4 * 7, 3: 4 * 8, 4: 4 * 9}[max_levels]


def test_nested_prefixes_level_by_level() -> None:
    engine = engine_of(CascadeConfig(shared_prefix_len=1, max_levels=3))
    for own in ([1, 1, 1, 1, 5], [2], [1, 1, 1, 1, 6], [3]):
        engine.add(SYSTEM + own, max_tokens=3)
    engine.add([50], max_tokens=3)
    engine.step()
    plan = engine.step()
    assert plan is not None
    system, nested = [0, 1], [2]
    assert pages_by_level(plan.cascade)[:2] == [[system, []], [nested, [], []]]
    assert [list(level.qo_indptr) for level in plan.cascade.shared_levels] == [[0, 4, 5], [0, 2, 4, 5]]


def test_the_leader_reads_alone_what_it_fills_and_its_followers_together() -> None:
    engine = SimulatedEngine()
    for own in (100, 101, 102):
        engine.add([*SYSTEM, own])
    plan = engine.step()
    assert plan is not None
    rows = [len(plan.cascade.leaf.rows(i)) for i in range(3)]
    assert sorted(rows) == [1, 1, 9]
    assert pages_by_level(plan.cascade)[0] == [[0, 1], []]
    assert plan.report.grouped_rows == 2


def test_a_given_length_replaces_the_cost_model() -> None:
    for shared_prefix_len, reason in ((8, None), (9, "no shared run of 9 tokens (cascade_shared_prefix_len)")):
        engine = engine_of(CascadeConfig(shared_prefix_len=shared_prefix_len))
        for own in (100, 101):
            engine.add([*SYSTEM, own])
        engine.step()
        plan = engine.step()
        assert plan is not None
        assert plan.report.reason == reason


@pytest.mark.parametrize(("prefix_len", "reason"), [(16, "the cost model expects no gain"), (16_000, None)])
def test_the_cost_model_decides_where_no_length_is_given(prefix_len: int, reason: str | None) -> None:
    shape = AttentionShape(num_qo_heads=8, num_kv_heads=2, head_dim=64, kv_dtype_bytes=2)
    limits = {"page_size": 16, "total_pages": 2000, "max_model_len": 20_000, "max_num_batched_tokens": 20_000}
    config = small_config(**limits, cascade=CascadeConfig())
    engine = SimulatedEngine(config, costs=CostModel(shape, DEVICE_COSTS["h200"]))
    for own in range(8):
        engine.add([*[1] * prefix_len, 100 + own])
    engine.schedule()
    plan = engine.schedule()
    assert plan is not None
    assert plan.report.reason == reason


def test_the_reason_is_given_where_nothing_is_shared() -> None:
    for cascade in (CascadeConfig(enabled=False), CascadeConfig(max_levels=1)):
        engine = engine_of(cascade)
        for own in (100, 101):
            engine.add([*SYSTEM, own])
        assert {plan.report.reason for plan in engine.run()} == {"cascade attention is off"}
    engine = SimulatedEngine()
    engine.add(SYSTEM)
    assert {plan.report.reason for plan in engine.run()} == {"one sequence"}
    engine.add([100, 101])
    engine.add([100, 102])
    assert {plan.report.reason for plan in engine.run()} == {"no two sequences share a full page"}
