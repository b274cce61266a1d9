"""The table of counts against the histories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.plan import LaneStart
from cascade_llm.sampling.token_usage import TokenHistories, UsageTable
from cascade_llm.sampling_params import SamplingParams
from tests.sampling.sampling_cases import lane_start, random_logits, starts

VOCAB_SIZE = 50


def same(values: torch.Tensor) -> torch.Tensor:
    return values


def table(num_lanes: int, max_model_len: int = 64) -> UsageTable:
    return UsageTable(num_lanes, VOCAB_SIZE, max_model_len, torch.device("cpu"), same)


@given(starts(VOCAB_SIZE, 4), starts(VOCAB_SIZE, 4), st.data())
def test_penalties_are_those_of_the_histories(
    first: list[LaneStart], second: list[LaneStart], data: st.DataObject
) -> None:
    """Exactly, since all numbers are quarters; lanes are entered twice."""
    usages = TokenHistories(5, same), table(5)
    for lane_starts in (first, second):
        for usage in usages:
            usage.start(lane_starts)
        for _ in range(data.draw(st.integers(0, 4))):
            lanes = data.draw(st.lists(st.integers(0, 3), unique=True))
            tokens = torch.tensor([data.draw(st.integers(0, VOCAB_SIZE - 1)) for _ in lanes], dtype=torch.int64)
            for usage in usages:
                usage.record(lanes, tokens)
        logits = random_logits(4, VOCAB_SIZE, seed=1)
        by_history, by_table = logits.clone(), logits.clone()
        usages[0].penalize(by_history, [2, 0, 3, 1])
        usages[1].penalize(by_table, [2, 0, 3, 1])
        assert torch.equal(by_history, by_table)
        assert [usages[0].penalizes(lane) for lane in range(4)] == [usages[1].penalizes(lane) for lane in range(4)]


def test_lanes_without_penalties_are_not_changed_by_those_beside_them() -> None:
    usage = table(3)
    usage.start([lane_start(0, SamplingParams(repetition_penalty=2.0)), lane_start(1, SamplingParams())])
    for _ in range(3):
        usage.note(torch.tensor([0, 1, 2, 2]), torch.tensor([7, 8, 9, 10]))  # lane 2 is nobody's
    logits = random_logits(3, VOCAB_SIZE, seed=2)
    logits[1, 8], logits[2, 9] = torch.inf, -torch.inf
    penalized = logits.clone()
    usage.penalize_rows(penalized, torch.tensor([0, 1, 2]))
    assert torch.equal(penalized[1:], logits[1:])
    assert (penalized[0] != logits[0]).nonzero().flatten().tolist() == [
        token for token in (1, 2, 3, 7) if logits[0, token] != 0
    ]


@pytest.mark.parametrize(("max_model_len", "num_bytes"), [(16383, 2), (16384, 4)])
def test_counts_hold_the_longest_sequence(max_model_len: int, num_bytes: int) -> None:
    assert UsageTable.bytes_needed(3, VOCAB_SIZE, max_model_len) == 3 * VOCAB_SIZE * num_bytes
    usage = table(3, max_model_len)
    assert usage.num_bytes == 3 * VOCAB_SIZE * num_bytes
    params = SamplingParams(frequency_penalty=0.5)
    usage.start([lane_start(1, params, prompt=[4], output=[4] * (max_model_len - 1))])
    logits = torch.zeros(1, VOCAB_SIZE)
    usage.penalize(logits, [1])
    assert logits[0, 4] == -0.5 * (max_model_len - 1)
