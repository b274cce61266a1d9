"""Which level a segment goes to: any arrangement is a right plan, and the cheapest is taken."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from cascade_llm.config import CascadeConfig
from cascade_llm.plan import StepPlan
from cascade_llm.scheduler.cascade.balance import arrangements, levels_by_depth, with_own_runs
from cascade_llm.scheduler.cascade.cost_model import AttentionShape, CostModel, plan_work
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS
from cascade_llm.scheduler.cascade.tree import Run, preorder
from tests.scheduler.cascade.test_layout import random_choice
from tests.scheduler.forests import paths_to_sequences, random_forest
from tests.scheduler.simulated_engine import SimulatedEngine, small_config

SHAPE = AttentionShape(num_qo_heads=32, num_kv_heads=8, head_dim=128, kv_dtype_bytes=2)
H200 = CostModel(SHAPE, replace(DEVICE_COSTS["h200"], measured=True))
PAGE_SIZE = 64


def chosen_paths(top: Run, chosen: dict[Run, int]) -> Iterator[list[Run]]:
    for path in paths_to_sequences(top).values():
        yield [run for run in path if run in chosen]


def test_every_arrangement_goes_down_each_path_and_leaves_no_level_empty() -> None:
    rng, numbers = random.Random(0), set[int]()
    for _ in range(300):
        top, _ = random_forest(rng, 9)
        max_levels = rng.randrange(1, 4)
        choice = random_choice(rng, top, max_levels)
        found = list(arrangements(top, choice, rng.choice((1, 100, 4000)), H200, max_levels))
        assert found[0] == levels_by_depth(top, choice)
        assert found == [levels for i, levels in enumerate(found) if levels not in found[:i]]
        numbers.add(len(found))
        for levels in found:
            assert set(levels) == set(choice.start_pages)
            assert set(levels.values()) == set(range(max(levels.values(), default=-1) + 1))
            assert max(levels.values(), default=-1) < max_levels
            for path in chosen_paths(top, levels):
                assert [levels[run] for run in path] == sorted({levels[run] for run in path})
    assert {1, 2, 3} <= numbers


def test_by_depth_takes_as_few_levels_as_there_can_be() -> None:
    rng = random.Random(1)
    for _ in range(100):
        top, _ = random_forest(rng, 9)
        choice = random_choice(rng, top, 3)
        levels = levels_by_depth(top, choice)
        for path in chosen_paths(top, levels):
            assert [levels[run] for run in path] == list(range(len(path)))


def test_runs_of_single_sequences_end_where_they_may() -> None:
    rng, num_added = random.Random(2), 0
    for _ in range(200):
        top, num_new = random_forest(rng, 9)
        max_levels = rng.randrange(1, 4)
        choice = random_choice(rng, top, max_levels)
        paths = paths_to_sequences(top)
        prefix_pages = [max((r.end for r in paths[i] if r in choice.start_pages), default=0) for i in range(len(paths))]
        ends = {i: max((r.end for r in paths[i]), default=0) for i in paths}
        own_ends = {i: ends[i] + rng.randrange(3) for i in paths if rng.random() < 0.5}
        more = with_own_runs(top, choice, prefix_pages, own_ends, num_new, max_levels)
        assert {
            run: start for run, start in more.start_pages.items() if run in choice.start_pages
        } == choice.start_pages
        for index, path in paths_to_sequences(top).items():
            above = [run for run in path if run in choice.start_pages]
            own = [run for run in path if run in more.start_pages and run not in choice.start_pages]
            expects_one = own_ends.get(index, 0) > prefix_pages[index] and len(above) < max_levels
            assert len(own) == expects_one
            for run in own:
                assert (more.start_pages[run], run.end) == (prefix_pages[index], own_ends[index])
                assert (run.members, run.num_sequences, run.num_rows) == ([index], 1, num_new[index])
            num_added += len(own)
        assert more.num_levels == max((len(path) for path in chosen_paths(top, more.start_pages)), default=0)
        assert [run.num_rows for run in preorder(top)] == [
            sum(num_new[i] for i, path in paths_to_sequences(top).items() if run in path or run is top)
            for run in preorder(top)
        ]
    assert num_added > 100


def decode_plan(prompts: Sequence[list[int]], costs: CostModel, **cascade: int) -> StepPlan:
    """The second step: all prompts are in the cache."""
    config = small_config(
        page_size=PAGE_SIZE,
        total_pages=20_000,
        max_model_len=120_000,
        max_num_seqs=300,
        max_num_batched_tokens=300_000,
        cascade=CascadeConfig(**cascade),
    )
    engine = SimulatedEngine(config, costs=costs)
    for prompt in prompts:
        engine.add(prompt, max_tokens=4)
    while True:
        plan = engine.step()
        assert plan is not None
        if plan.num_rows == len(prompts):
            return plan


def text(family: int, length: int, own: int) -> list[int]:
    return [family] * length + [own] * 70


HEAVY_AMONG_LIGHT = [text(0, 32_768, 100 + i) for i in range(8)] + [
    text(1 + group, 512, 100 + i) for group in range(40) for i in range(4)
]
LONG_AMONG_SHORT = [text(i, 64, i) for i in range(63)] + [text(63, 60_000, 63)]


def test_a_heavy_segment_does_not_share_a_level_with_many_light_ones() -> None:
    plan = decode_plan(HEAVY_AMONG_LIGHT, H200)
    segments = [[tokens for tokens, _ in level] for level in plan_work(plan.cascade).shared]
    assert segments[0] == [32_768]
    assert set(segments[1]) == {512}
    assert len(segments[1]) == 40
    together = decode_plan(HEAVY_AMONG_LIGHT, H200, max_levels=2)
    assert len(together.cascade.shared_levels) == 1, "there is no second level to put them on"
    assert H200.plan_s(plan_work(plan.cascade)) < 0.5 * H200.plan_s(plan_work(together.cascade))


def test_a_sequence_much_longer_than_the_others_gets_a_segment_of_its_own() -> None:
    plan = decode_plan(LONG_AMONG_SHORT, H200)
    work = plan_work(plan.cascade)
    assert work.shared == [[(60_032, 1)]], "its full pages"
    assert plan.report.num_levels == 2
    assert (plan.report.num_groups, plan.report.grouped_rows, plan.report.kv_tokens_saved) == (0, 0, 0)
    assert plan.report.reason == "no two sequences share a full page"
    plain = decode_plan(LONG_AMONG_SHORT, H200, max_levels=1)
    assert H200.plan_s(work) < 0.5 * H200.plan_s(plan_work(plain.cascade))


@pytest.mark.parametrize("device", ["cpu", "h200"])
@pytest.mark.parametrize("prompts", [HEAVY_AMONG_LIGHT, LONG_AMONG_SHORT])
def test_nothing_is_balanced_on_one_processor_or_by_constants_that_nobody_measured(
    prompts: list[list[int]], device: str
) -> None:
    plan = decode_plan(prompts, CostModel(SHAPE, DEVICE_COSTS[device]))
    assert all(rows > 1 for level in plan_work(plan.cascade).shared for _, rows in level)
    assert len(plan.cascade.shared_levels) <= 1


def test_balance_outlives_a_choice_by_length() -> None:
    """`cascade_shared_prefix_len` says what is shared, not where."""
    plan = decode_plan(HEAVY_AMONG_LIGHT, H200, shared_prefix_len=256)
    assert [len(level) for level in plan_work(plan.cascade).shared] == [1, 40]


@pytest.mark.parametrize(("num_loads", "seed"), [(3, 3), pytest.param(24, 4, marks=pytest.mark.slow)])
def test_the_cheapest_arrangement_is_never_dearer_than_by_depth(num_loads: int, seed: int) -> None:
    """And cheaper for one load at least."""
    rng, num_better = random.Random(seed), 0
    for _ in range(num_loads):
        prompts = [
            text(group, rng.choice((0, 128, 1024, 16_384)), 1000 * group + i)
            for group in range(rng.randrange(2, 30))
            for i in range(rng.choice((1, 2, 8, 20)))
        ]
        plans = {most: decode_plan(prompts, H200, max_levels=most) for most in (1, 2, 3)}
        seconds = {most: H200.plan_s(plan_work(plan.cascade)) for most, plan in plans.items()}
        assert seconds[3] <= seconds[2] <= seconds[1]
        num_better += seconds[3] < seconds[2]
    assert num_better
