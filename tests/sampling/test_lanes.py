from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.plan import LaneStart
from cascade_llm.sampling.lanes import NO_TOKEN, LaneState
from cascade_llm.sampling.logprobs import padded_floats
from cascade_llm.sampling_params import SamplingParams
from tests.sampling.reference_sampler import adjusted_logits
from tests.sampling.sampling_cases import PROMPT_LEN, lane_start, random_logits, starts

VOCAB_SIZE = 50
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 2.0}


def adjusted(lanes: LaneState, lane: int, num_generated: int, logits: torch.Tensor) -> torch.Tensor:
    values = padded_floats(logits)
    lanes.adjust(values, torch.tensor([lane]), torch.tensor([PROMPT_LEN + num_generated]))
    return values[:, :VOCAB_SIZE]


@given(starts(VOCAB_SIZE, 4), st.booleans(), st.data())
def test_adjusted_logits_after_any_tokens(lane_starts: list[LaneStart], in_graphs: bool, data: st.DataObject) -> None:
    lanes = LaneState(6, VOCAB_SIZE, in_graphs=in_graphs)
    lanes.start(lane_starts[:3])
    lanes.start(lane_starts[3:])
    outputs = [list(start.output_token_ids) for start in lane_starts]
    for _ in range(data.draw(st.integers(0, 4))):
        sampled = data.draw(st.lists(st.integers(0, 3), unique=True))
        tokens = [data.draw(st.integers(0, VOCAB_SIZE - 1)) for _ in sampled]
        lanes.record(sampled, torch.tensor(tokens, dtype=torch.int64))
        for lane, token in zip(sampled, tokens, strict=True):
            outputs[lane].append(token)
            assert int(lanes.last_tokens[lane]) == token
    logits = random_logits(4, VOCAB_SIZE, seed=1)
    order = [2, 0, 3, 1]
    values = padded_floats(logits[order])
    positions = torch.tensor([PROMPT_LEN + len(outputs[lane]) for lane in order])
    lanes.adjust(values, torch.tensor(order), positions)
    for row, lane in enumerate(order):
        expected = torch.tensor(adjusted_logits(logits[lane].tolist(), lane_starts[lane], outputs[lane]))
        torch.testing.assert_close(values[row, :VOCAB_SIZE], expected, rtol=1e-6, atol=1e-6)


def test_a_lane_forgets_its_last_sequence() -> None:
    logits = random_logits(1, VOCAB_SIZE, seed=0)
    heavy = SamplingParams(logit_bias={4: 9.0}, min_tokens=5, top_k=3, **PENALTIES)  # type: ignore[arg-type]
    lanes = LaneState(2, VOCAB_SIZE)
    lanes.start([lane_start(1, heavy, output=[8, 9])])
    assert not torch.equal(adjusted(lanes, 1, 2, logits), logits)
    lanes.start([lane_start(1, SamplingParams())])
    assert torch.equal(adjusted(lanes, 1, 0, logits), logits)
    assert int(lanes.filters(torch.tensor([1])).top_k) == VOCAB_SIZE
    lanes.start([lane_start(1, SamplingParams(**PENALTIES), prompt=[7, 7], output=[])])  # type: ignore[arg-type]
    assert (adjusted(lanes, 1, 0, logits) != logits).nonzero()[:, 1].tolist() in ([7], [])


def test_a_resumed_sequence_is_as_if_it_had_gone_on() -> None:
    params = SamplingParams(**PENALTIES)  # type: ignore[arg-type]
    gone_on, resumed = LaneState(3, VOCAB_SIZE), LaneState(3, VOCAB_SIZE)
    gone_on.start([lane_start(2, params)])
    for token in (4, 9, 4):
        gone_on.record([2], torch.tensor([token]))
    resumed.start([lane_start(0, params, output=[4, 9, 4])])
    logits = random_logits(1, VOCAB_SIZE, seed=0)
    assert torch.equal(adjusted(gone_on, 2, 3, logits), adjusted(resumed, 0, 3, logits))
    assert int(gone_on.last_tokens[2]) == int(resumed.last_tokens[0]) == 4
    assert int(gone_on.draw_keys[2]) == int(resumed.draw_keys[0])


def test_ending_ids_outside_the_vocabulary_need_no_mask() -> None:
    lanes = LaneState(1, VOCAB_SIZE)
    start = LaneStart(0, 0, SamplingParams(min_tokens=1), 0, 0, [1], [], frozenset({2, VOCAB_SIZE + 3}))
    lanes.start([start])
    values = adjusted(lanes, 0, 1 - PROMPT_LEN, torch.zeros(1, VOCAB_SIZE))
    assert values.isinf().nonzero()[:, 1].tolist() == [2]


def test_a_lane_without_a_sequence_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="lane 1"):
        LaneState(2, VOCAB_SIZE).params(1)


def test_nothing_to_do() -> None:
    lanes = LaneState(2, VOCAB_SIZE)
    lanes.start([])
    lanes.record([], torch.zeros(0, dtype=torch.int64))
    assert lanes.last_tokens.tolist() == [0, 0, NO_TOKEN]
