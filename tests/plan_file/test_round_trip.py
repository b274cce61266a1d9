"""What is written is what is read: every column, and which levels are the same object as in the step before."""

from __future__ import annotations

import gzip
from itertools import pairwise
from pathlib import Path

import pytest

from cascade_llm.plan import CascadeLevel, StepPlan
from cascade_llm.plan_file.step_json import LEVEL_COLUMNS, STEP_COLUMNS
from tests.plan_file.recordings import read, write
from tests.scheduler.generated import generated_steps, random_config

NUM_SEEDS, NUM_STEPS = 12, 25


def generated(seed: int) -> tuple[list[StepPlan], dict[str, int]]:
    import random

    config = random_config(random.Random(seed))
    plans = [plan for plan, _ in generated_steps(seed, NUM_STEPS, config=config)]
    names = ("page_size", "total_pages", "max_model_len", "max_num_seqs")
    return plans, {name: getattr(config, name) for name in names}


def levels(plan: StepPlan) -> list[CascadeLevel]:
    return [level for cascade in plan.cascades for level in cascade.levels]


def kept_objects(plans: list[StepPlan]) -> list[list[tuple[int, int, str]]]:
    """Which levels and columns of each step are objects of the step before."""
    kept = []
    for earlier, later in pairwise(plans):
        pairs = [(i, j, a, b) for i, a in enumerate(levels(earlier)) for j, b in enumerate(levels(later))]
        whole = [(i, j, "level") for i, j, a, b in pairs if a is b]
        columns = [(i, j, n) for i, j, a, b in pairs for n in LEVEL_COLUMNS if getattr(a, n) is getattr(b, n)]
        kept.append(whole + columns)
    return kept


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_plans_come_back(seed: int, tmp_path: Path) -> None:
    plans, limits = generated(seed)
    steps = read(write(tmp_path / "plans.gz", plans, **limits))
    assert [step.plan.step_id for step in steps] == [plan.step_id for plan in plans]
    for step, plan in zip(steps, plans, strict=True):
        assert step.token_ids == list(range(len(plan.sample_rows)))
        for name in (*STEP_COLUMNS, "token_ids", "prompt_logprob_token_ids"):
            assert getattr(step.plan, name) == getattr(plan, name), name
        for found, wanted in zip(levels(step.plan), levels(plan), strict=True):
            assert all(getattr(found, name) == getattr(wanted, name) for name in LEVEL_COLUMNS)
        assert [(c.page_size, c.window_len) for c in step.plan.cascades] == [
            (c.page_size, c.window_len) for c in plan.cascades
        ]
        assert step.plan.page_copies == plan.page_copies
        assert step.plan.report == plan.report
        for found_start, start in zip(step.plan.lane_starts, plan.lane_starts, strict=True):
            assert found_start.params == start.params
            assert list(found_start.prompt_token_ids) == list(start.prompt_token_ids)
            assert list(found_start.output_token_ids) == list(start.output_token_ids)
            names = ("lane", "epoch", "seed", "sample_index", "ending_token_ids")
            assert all(getattr(found_start, name) == getattr(start, name) for name in names)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_objects_that_were_kept_are_kept(seed: int, tmp_path: Path) -> None:
    """Some loads keep nothing; `test_recording` has one of which the shared levels must be kept."""
    plans, limits = generated(seed)
    found = kept_objects([step.plan for step in read(write(tmp_path / "plans.gz", plans, **limits))])
    wanted = kept_objects(plans)
    assert [set(kept) for kept in wanted] == [set(kept) for kept in found]


def test_without_token_ids_lengths_are_all_that_is_kept(tmp_path: Path) -> None:
    plans, limits = generated(3)
    path = write(tmp_path / "plans.gz", plans, **limits, token_ids=False)
    text = gzip.decompress(path.read_bytes()).decode()
    assert '"token_ids":[' not in text
    assert '"stop' not in text
    for step, plan in zip(read(path), plans, strict=True):
        assert step.token_ids is None
        assert step.plan.token_ids.tolist() == [0] * plan.num_rows
        assert step.plan.slots == plan.slots
        for found, start in zip(step.plan.lane_starts, plan.lane_starts, strict=True):
            assert list(found.prompt_token_ids) == [0] * len(start.prompt_token_ids)
