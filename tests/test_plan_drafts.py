"""Drafts in a step: a lane's last rows, and what a result says of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cascade_llm.errors import PlanError
from cascade_llm.plan import StepPlan, StepResult, int_column
from tests.plan_cases import DRAWN, step_of

PAGE_SIZE = 4


def drafting_step(changes: dict[str, Any]) -> StepPlan:
    """A sequence in lane 10 with its last token and two proposed ones in rows 0 to 2, and one that decodes in row 3."""
    sequences = (replace(DRAWN[2], num_new=3), DRAWN[0].__class__(((2, ()),), leaf_pages=(9,), leaf_len=2, num_new=1))
    columns = {
        "lane_rows": [],
        "lane_row_lanes": [],
        "sample_rows": [0, 1, 2, 3],
        "sample_lanes": [10, 10, 10, 11],
        "sample_positions": [5, 6, 7, 2],
        "draft_samples": [0],
        "draft_lens": [2],
    }
    step = step_of(sequences, PAGE_SIZE)
    return replace(step, **{name: int_column(values) for name, values in {**columns, **changes}.items()})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"draft_samples": [], "draft_lens": []}, "a lane is sampled twice in one step"),
        ({"draft_lens": [0]}, "a draft of 0 tokens from sample 0 on, of 4"),
        ({"draft_lens": [4]}, "a draft of 4 tokens from sample 0 on, of 4"),
        ({"draft_samples": [-1]}, "a draft of 2 tokens from sample -1 on"),
        ({"draft_lens": [1]}, "from sample 0 on is not drawn from its sequence's last rows"),
        ({"draft_samples": [1]}, "from sample 1 on is not drawn from its sequence's last rows"),
        (
            {"sample_rows": [0, 2, 1, 3], "sample_positions": [5, 7, 6, 2]},
            "from sample 0 on is not drawn from its sequence's last rows",
        ),
        ({"sample_lanes": [10, 10, 20, 11]}, "from sample 0 on is not drawn for its own lane"),
        ({"sample_lanes": [20, 20, 20, 11]}, "from sample 0 on is not drawn for its own lane"),
        ({"lane_rows": [1], "lane_row_lanes": [10]}, "takes a proposed token from a lane"),
        ({"draft_samples": [0, 0], "draft_lens": [2, 2], "sample_lanes": [10, 10, 10, 10]}, "sampled twice"),
    ],
)
def test_a_draft_is_a_lanes_last_rows(changes: dict[str, Any], words: str) -> None:
    drafting_step({}).check()
    drafting_step({"lane_rows": [0], "lane_row_lanes": [10]}).check()
    with pytest.raises(PlanError, match=words):
        drafting_step(changes).check()


def test_a_result_says_how_much_of_each_draft_was_drawn() -> None:
    step = drafting_step({})
    result = StepResult(step_id=7, token_ids=(4, 5, 6, 7), accepted_counts=(2,))
    result.check(step)
    replace(result, accepted_counts=(0,)).check(step)
    for counts, words in (((), "0 accepted_counts for a plan that asks for 1"), ((3,), r"\[3\] for drafts of \[2\]")):
        with pytest.raises(PlanError, match=words):
            replace(result, accepted_counts=counts).check(step)
