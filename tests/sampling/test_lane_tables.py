from __future__ import annotations

import pytest
import torch

from cascade_llm.sampling.lane_tables import TokenLists, UsageCounts
from cascade_llm.sampling_params import SamplingParams
from tests.sampling.sampling_cases import lane_start, random_logits

VOCAB_SIZE = 50
CPU = torch.device("cpu")


def same(values: torch.Tensor) -> torch.Tensor:
    return values


def counts(num_lanes: int, max_model_len: int = 64) -> UsageCounts:
    return UsageCounts(num_lanes, VOCAB_SIZE, max_model_len, CPU, same)


def test_lanes_without_penalties_are_not_changed_by_those_beside_them() -> None:
    usage = counts(3)
    usage.start([lane_start(0, SamplingParams(repetition_penalty=2.0)), lane_start(1, SamplingParams())])
    for _ in range(3):
        usage.note(torch.tensor([0, 1, 2, 2]), torch.tensor([7, 8, 9, 10]))  # lane 2 is nobody's
    logits = random_logits(3, VOCAB_SIZE, seed=2)
    logits[1, 8], logits[2, 9] = torch.inf, -torch.inf
    penalized = logits.clone()
    usage.penalize(penalized, torch.tensor([0, 1, 2]))
    assert torch.equal(penalized[1:], logits[1:])
    assert (penalized[0] != logits[0]).nonzero().flatten().tolist() == [
        token for token in (1, 2, 3, 7) if logits[0, token] != 0
    ]


def test_counts_exist_once_a_lane_has_a_penalty() -> None:
    usage = counts(2)
    usage.start([lane_start(0, SamplingParams(top_p=0.5))])
    usage.note(torch.tensor([0]), torch.tensor([3]))
    assert usage.counts is None
    usage.start([lane_start(1, SamplingParams(frequency_penalty=0.5), prompt=[1] * 1000, output=[5])])
    for _ in range(1500):
        usage.note(torch.tensor([0, 1]), torch.tensor([6, 7]))
    values = torch.zeros(1, VOCAB_SIZE)
    usage.penalize(values, torch.tensor([1]))
    assert values[0, [1, 5, 6, 7]].tolist() == [0.0, -0.5, 0.0, -750.0]


@pytest.mark.parametrize(("max_model_len", "num_bytes"), [(16383, 2), (16384, 4)])
def test_counts_hold_the_longest_sequence(max_model_len: int, num_bytes: int) -> None:
    assert UsageCounts.bytes_needed(3, VOCAB_SIZE, max_model_len) == 3 * VOCAB_SIZE * num_bytes
    usage = counts(3, max_model_len)
    assert usage.allocate().nbytes == 3 * VOCAB_SIZE * num_bytes
    params = SamplingParams(frequency_penalty=0.5)
    usage.start([lane_start(1, params, prompt=[4], output=[4] * (max_model_len - 1))])
    logits = torch.zeros(1, VOCAB_SIZE)
    usage.penalize(logits, torch.tensor([1]))
    assert logits[0, 4] == -0.5 * (max_model_len - 1)


def test_lists_grow_and_keep_what_other_lanes_have() -> None:
    lists = TokenLists(3, VOCAB_SIZE, CPU, same)
    lists.set(0, {4: 1.0}, [], 0)
    lists.set(2, dict.fromkeys(range(9), 0.5), [3, 5, 7], 10)
    lists.set(0, {4: 1.0}, [1], 12)
    values, lanes = torch.zeros(3, VOCAB_SIZE + 1), torch.arange(3)
    lists.apply(values, lanes, torch.full((3,), 11))
    assert values[:, :VOCAB_SIZE].nonzero().tolist() == [[0, 1], [0, 4], *([2, token_id] for token_id in range(9))]
    assert values[0, [1, 4]].tolist() == [-torch.inf, 1.0]
    assert not values[2, :VOCAB_SIZE].isinf().any()
    lists.apply(values, lanes, torch.full((3,), 9))
    assert values[2, [2, 3, 5, 7]].tolist() == [1.0, -torch.inf, -torch.inf, -torch.inf]
    assert values[0, 4] == 2.0


def test_fixed_lists_say_what_they_hold() -> None:
    lists = TokenLists(3, VOCAB_SIZE, CPU, same, capacities=(2, 1))
    assert lists.holds({1: 1.0, 2: 1.0}, [4])
    assert not lists.holds({1: 1.0, 2: 1.0, 3: 1.0}, [])
    assert not lists.holds({}, [4, 5])
