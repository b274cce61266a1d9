"""What is written is what is read: every column, and which levels are the same object as in the step before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import PageCopy, StepPlan, StepResult, Tier
from cascade_llm.plan_file import PlanFileWriter
from tests.plan_file.recordings import header, messages, read, result_of, write
from tests.scheduler.generated import generated_steps, random_config
from tests.test_plan_codec import full_step, kept_objects, plain

NUM_SEEDS, NUM_STEPS = 12, 25


def generated(seed: int) -> tuple[list[StepPlan], dict[str, Any]]:
    import random

    config = random_config(random.Random(seed))
    plans = [plan for plan, _ in generated_steps(seed, NUM_STEPS, config=config)]
    limits = {name: getattr(config, name) for name in ("page_size", "max_model_len", "max_num_seqs")}
    return plans, {**limits, "pool_pages": [config.total_pages, *config.window_pages]}


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_plans_come_back(seed: int, tmp_path: Path) -> None:
    plans, limits = generated(seed)
    steps = read(write(tmp_path / "plans.gz", plans, **limits))
    assert [step.plan.step_id for step in steps] == [plan.step_id for plan in plans]
    assert [plain(step.plan) for step in steps] == [plain(plan) for plan in plans]
    assert [step.result for step in steps] == [result_of(plan) for plan in plans]


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_objects_that_were_kept_are_kept(seed: int, tmp_path: Path) -> None:
    """Some loads keep nothing; `test_recording` has one of which the shared levels must be kept."""
    plans, limits = generated(seed)
    found = kept_objects([step.plan for step in read(write(tmp_path / "plans.gz", plans, **limits))])
    wanted = kept_objects(plans)
    assert found == wanted


def test_without_token_ids_lengths_are_all_that_is_kept(tmp_path: Path) -> None:
    plans, limits = generated(3)
    path = write(tmp_path / "plans.gz", plans, **limits, token_ids=False)
    for step, plan in zip(read(path), plans, strict=True):
        assert step.token_ids is None
        assert step.plan.token_ids.tolist() == [0] * plan.num_rows
        assert step.plan.slots == plan.slots
        for found, start in zip(step.plan.lane_starts, plan.lane_starts, strict=True):
            assert list(found.prompt_token_ids) == [0] * len(start.prompt_token_ids)


def test_without_token_ids_the_users_words_are_left_out(tmp_path: Path) -> None:
    step = full_step()
    limits = {"page_size": 4, "num_layers": 3, "token_ids": False}
    path = write(tmp_path / "plans.gz", [step, step], **limits)
    (found,) = (start for start in step.lane_starts)
    words = [str(word).encode() for word in (*(found.params.stop or ()), *(found.params.logit_bias or ()))]
    content = b"".join(messages(path)[1:])
    assert found.params.stop == ("end", "\u00e4\n")
    assert not any(b'"' + word in content or b"[" + word in content for word in words)
    assert len(messages(path)) == 3, "a header, two steps and no result"


def test_samples_behind_what_was_accepted_mean_nothing(tmp_path: Path) -> None:
    """Three samples of a draft of two tokens, of which one was accepted; the third is left over."""
    step = full_step()
    with_prompt = header(page_size=4, num_layers=3, vocab_size=64, pool_pages=[400, 8])
    writer = PlanFileWriter(tmp_path / "plans.gz", token_ids=True)
    writer.begin(with_prompt)
    start = replace(step.lane_starts[0], lane=10, epoch=1)
    copies = (PageCopy(1, 2), PageCopy(2**40, 9, Tier.REMOTE, Tier.HOST), PageCopy(3, 2, pool=1))
    writer.write_step(replace(step, lane_starts=(start,), page_copies=copies))
    logprob = TokenLogprob(4, -1.0, 1, ())
    writer.write_result(StepResult(step_id=7, token_ids=[3, 9, -1], accepted_counts=[1], prompt_logprobs=[logprob]))
    writer.close()
    (found,) = read(tmp_path / "plans.gz")
    assert found.token_ids == [3, 9, None]
    assert found.rejected_samples == {2}
    assert found.plan.page_copies == copies
