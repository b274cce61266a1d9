"""What sampling graphs hold, over generated cases: to do more than a lane needs gives the eager sampler's token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_llm.plan import LaneStart
from cascade_llm.sampling.lanes import BIAS_CAPACITY, ENDING_CAPACITY, LaneState, Needs
from cascade_llm.sampling.logprobs import read_report, report
from cascade_llm.sampling.masks import TokenMasks
from cascade_llm.sampling.sampler import Sampler, choose
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.worker.graph_sampling import CHOICES
from tests.sampling.reference_sampler import adjusted_logits
from tests.sampling.sampling_cases import lane_start, random_logits, starts

VOCAB_SIZE = 300


class Twins:
    """The same lanes, with the fixed tables of graphs and with those that grow; the first have a lane for padding."""

    def __init__(self, num_lanes: int, vocab_size: int = VOCAB_SIZE) -> None:
        self.lanes = LaneState(num_lanes + 1, vocab_size, max_model_len=64, in_graphs=True)
        self.eager_lanes = LaneState(num_lanes, vocab_size)
        self.eager = Sampler(self.eager_lanes, compiled=False)
        self.num_lanes = num_lanes

    def start(self, lane_starts: list[LaneStart]) -> None:
        self.lanes.start(lane_starts)
        self.eager_lanes.start(lane_starts)

    def compare(
        self, logits: torch.Tensor, order: list[int], positions: list[int], needs: Needs | None = None
    ) -> list[int]:
        """Sample these lanes both ways, two rows of padding behind them; returns the tokens."""
        wanted = self.lanes.needs(order) & ~Needs.REPORT
        together = next(choice for choice in CHOICES if wanted in choice) if needs is None else needs
        rows = torch.tensor([*order, self.num_lanes, self.num_lanes])
        padded = torch.cat([logits, logits[:1].expand(2, -1)])
        token_ids, finite = choose(together, padded, self.lanes, rows, torch.tensor([*positions, 1, 1]), in_graph=True)
        self.lanes.note(rows, token_ids, count=Needs.ADJUST in together)
        expected = self.eager.sample(logits, order, positions)
        self.eager_lanes.record(order, expected.token_ids)
        assert token_ids[: len(order)].tolist() == expected.token_ids.tolist()
        assert finite[: len(order)].tolist() == expected.finite.tolist()
        assert self.lanes.last_tokens[torch.tensor(order)].tolist() == expected.token_ids.tolist()
        values, ids = report(padded, token_ids, 20)
        for i, wanted_report in enumerate(expected.logprobs):
            count = self.lanes.params(order[i]).logprobs
            found = None if count is None else read_report(values[i], ids[i], int(token_ids[i]), count)
            assert found == wanted_report
        return expected.token_ids.tolist()


def with_logprobs(start: LaneStart, count: int | None) -> LaneStart:
    return replace(start, params=replace(start.params, logprobs=count))


@given(starts(VOCAB_SIZE, 4), starts(VOCAB_SIZE, 4), st.data())
@settings(max_examples=60)
def test_tokens_are_those_of_the_eager_sampler(
    first: list[LaneStart], second: list[LaneStart], data: st.DataObject
) -> None:
    """Step after step, each feeding the next one's penalties; then other sequences enter the same lanes."""
    twins = Twins(4)
    second = [with_logprobs(start, data.draw(st.none() | st.integers(0, 20))) for start in second]
    seed = data.draw(st.integers(0, 1000))
    for lane_starts in (first, second):
        twins.start(lane_starts)
        lengths = [len(start.prompt_token_ids) + len(start.output_token_ids) for start in lane_starts]
        for step in range(4):
            order = data.draw(st.permutations(range(4)))[: 4 - step % 2]
            generator = torch.Generator().manual_seed(seed + step)
            logits = 3 * torch.randn(len(order), VOCAB_SIZE, generator=generator)
            twins.compare(logits, order, [lengths[lane] for lane in order])
            for lane in order:
                lengths[lane] += 1


@pytest.mark.parametrize("needs", CHOICES, ids=str)
def test_a_graph_that_does_more_than_a_lane_needs_changes_nothing(needs: Needs) -> None:
    """A greedy lane and one that draws, by every graph that may serve them."""
    twins = Twins(2)
    plain = [SamplingParams(temperature=0), SamplingParams(temperature=0.8)]
    twins.start([lane_start(lane, params) for lane, params in enumerate(plain)])
    order = [1, 0] if Needs.DRAW in needs else [0]
    for step in range(3):
        logits = 3 * torch.randn(len(order), VOCAB_SIZE, generator=torch.Generator().manual_seed(step))
        twins.compare(logits, order, [5 + step] * len(order), needs)


def test_lists_as_long_as_their_capacity() -> None:
    vocab_size = 2 * BIAS_CAPACITY
    twins = Twins(2, vocab_size)
    bias = {token_id: 0.25 * (token_id % 7) for token_id in range(1, 1 + BIAS_CAPACITY)}
    endings = frozenset(range(100, 100 + ENDING_CAPACITY))
    params = SamplingParams(temperature=0, logit_bias=bias, min_tokens=3)
    start = LaneStart(0, 0, params, 0, 0, [1, 2], [], endings)
    twins.start([start, lane_start(1, SamplingParams(temperature=0, logit_bias={0: 1.0}))])
    logits = random_logits(2, vocab_size, seed=0)
    logits[0, 100 : 100 + ENDING_CAPACITY] += 50.0
    tokens = [twins.compare(logits, [0, 1], [2 + step, 5])[0] for step in range(4)]
    assert [token in endings for token in tokens] == [False, False, False, True]


def test_what_exceeds_a_capacity_is_named_and_sampled_eagerly() -> None:
    vocab_size = 2000
    lanes, plain = LaneState(3, vocab_size, in_graphs=True), LaneState(3, vocab_size)
    over = {token_id: float(token_id % 5) for token_id in range(BIAS_CAPACITY + 1)}
    both = SamplingParams(min_tokens=1, logit_bias={7: 2.0})
    many = LaneStart(1, 0, both, 0, 0, [1], [], frozenset(range(ENDING_CAPACITY + 1)))
    for state in (lanes, plain):
        state.start([lane_start(0, SamplingParams(logit_bias=over)), many, lane_start(2, SamplingParams())])
    assert [lanes.reason_against_graphs([lane]) for lane in range(3)] == [
        "a logit_bias of more than 512 tokens",
        "min_tokens with more than 64 ending tokens",
        None,
    ]
    logits, positions = random_logits(3, vocab_size, seed=0, scale=0.5), [5, 1, 5]
    sampled = [Sampler(state, compiled=False).sample(logits, range(3), positions) for state in (lanes, plain)]
    assert sampled[0].token_ids.tolist() == sampled[1].token_ids.tolist()
    lanes.start([lane_start(lane, SamplingParams(logit_bias={3: 1.0})) for lane in range(2)])
    plain.start([lane_start(lane, SamplingParams(logit_bias={3: 1.0})) for lane in range(2)])
    assert lanes.reason_against_graphs(range(3)) is None
    sampled = [Sampler(state, compiled=False).sample(logits, range(3), positions) for state in (lanes, plain)]
    assert sampled[0].token_ids.tolist() == sampled[1].token_ids.tolist()


@pytest.mark.parametrize("needs", CHOICES, ids=str)
def test_a_broken_row_gives_a_token_of_the_vocabulary(needs: Needs) -> None:
    """The next step is under way with it already: its embedding must exist."""
    lanes = LaneState(3, VOCAB_SIZE, in_graphs=True)
    lanes.start([lane_start(lane, SamplingParams(seed=lane, repetition_penalty=2.0)) for lane in range(3)])
    logits = random_logits(3, VOCAB_SIZE, seed=3)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    for position in range(20):
        index = torch.arange(3)
        token_ids, finite = choose(needs, logits, lanes, index, torch.full((3,), position), in_graph=True)
        lanes.note(index, token_ids)
        report(logits, token_ids, 20)
        assert finite.tolist() == [False, False, True]
        assert int(token_ids.max()) < VOCAB_SIZE


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("vocab_size", [31, 32, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_sample_is_one_of_its_tokens_and_others_are_as_before(
    compiled: bool, vocab_size: int, dtype: torch.dtype
) -> None:
    """The mask comes after the bias, and before the temperature: what is left has all the mass."""
    kinds = [SamplingParams(temperature=0), SamplingParams(temperature=2.0, top_p=0.9), SamplingParams(temperature=3.0)]
    kinds.append(SamplingParams(temperature=0, logit_bias={5: 100.0}, repetition_penalty=2.0))
    lanes = LaneState(8, vocab_size)
    lane_starts = [lane_start(lane, kinds[lane % 4], seed=lane) for lane in range(8)]
    lanes.start(lane_starts)
    sampler = Sampler(lanes, compiled=compiled)
    logits = random_logits(8, vocab_size, seed=vocab_size, dtype=dtype)
    allowed = torch.zeros(3, -(-vocab_size // 32) * 32, dtype=torch.bool)
    allowed[0, [1, 30, vocab_size - 1]] = allowed[1, [0, 2, 31 % vocab_size, vocab_size - 2]] = True
    shifted = allowed.view(3, -1, 32).long() << torch.arange(32)
    masks = TokenMasks(shifted.sum(-1).to(torch.int32), torch.tensor([0, 0, 0, 1, 1, 1, -1, 2]))
    free = sampler.sample(logits, range(8), [9] * 8)
    masked = sampler.sample(logits, range(8), [9] * 8, masks=masks)
    for row, mask_row in enumerate(masks.rows.tolist()[:6]):
        assert allowed[mask_row, masked.token_ids[row]]
        adjusted = torch.tensor(adjusted_logits(logits[row].tolist(), lane_starts[row], []))
        if kinds[row % 4].greedy:
            best = adjusted.masked_fill(~allowed[mask_row, :vocab_size], -torch.inf).argmax()
            assert masked.token_ids[row] == best
    assert masked.token_ids[6] == free.token_ids[6]
    assert masked.finite.tolist() == [True] * 7 + [False]


def test_rows_of_a_draft_have_positions_of_their_own() -> None:
    """Several samples of one lane: each is what the lane would draw there, given those logits."""
    lanes = LaneState(2, VOCAB_SIZE)
    lanes.start([lane_start(lane, SamplingParams(temperature=1.5), seed=lane) for lane in range(2)])
    logits = random_logits(4, VOCAB_SIZE, seed=1)
    sampler = Sampler(lanes)
    together = sampler.sample(logits, [1, 1, 1, 0], [6, 7, 8, 6]).token_ids.tolist()
    alone = [
        sampler.sample(logits[row : row + 1], [lane], [position]).token_ids.tolist()[0]
        for row, (lane, position) in enumerate([(1, 6), (1, 7), (1, 8), (0, 6)])
    ]
    assert together == alone
    assert len(set(together)) > 1
