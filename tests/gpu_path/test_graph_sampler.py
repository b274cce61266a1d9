"""What sampling graphs compute, against the eager sampler, over generated cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_llm.plan import LaneStart
from cascade_llm.sampling.candidates import BLOCK_LEN
from cascade_llm.sampling.graph_logprobs import LOGPROBS_CAPACITY, GraphLogprobs, most_probable, read_logprobs
from cascade_llm.sampling.graph_sampler import GraphSampler
from cascade_llm.sampling.lane_lists import BIAS_CAPACITY, ENDING_CAPACITY, LaneLists
from cascade_llm.sampling.lanes import LaneState
from cascade_llm.sampling.sampler import Sampler
from cascade_llm.sampling.sampling_features import Adjustment, Choice, FeatureSet, LaneFeatures
from cascade_llm.sampling.token_usage import UsageTable
from cascade_llm.sampling_params import SamplingParams
from tests.gpu_path.gpu_engine import double_gpu
from tests.sampling.sampling_cases import lane_start, random_logits, starts

VOCAB_SIZE = 300
CPU = torch.device("cpu")


class Twins:
    """The same lanes, sampled by graphs' means and eagerly."""

    def __init__(self, num_lanes: int, vocab_size: int = VOCAB_SIZE) -> None:
        def same(values: torch.Tensor) -> torch.Tensor:
            return values

        usage = UsageTable(num_lanes + 1, vocab_size, 64, CPU, same)
        self.lanes, self.eager_lanes = (
            LaneState(num_lanes + 1, vocab_size, usage=usage),
            LaneState(num_lanes, vocab_size),
        )
        self.lists = LaneLists(num_lanes + 1, vocab_size, CPU, same)
        self.features = LaneFeatures(num_lanes + 1, vocab_size)
        self.logprobs = GraphLogprobs(num_lanes + 2, vocab_size, CPU)
        self.sampler = GraphSampler(self.lanes, usage, self.lists, self.logprobs, num_lanes + 2, double_gpu().ops())
        self.eager = Sampler(self.eager_lanes, compiled=False)
        self.num_lanes = num_lanes

    def start(self, lane_starts: list[LaneStart]) -> None:
        self.lanes.start(lane_starts)
        self.lists.start(lane_starts)
        self.features.start(lane_starts)
        self.eager_lanes.start(lane_starts)

    def compare(
        self, logits: torch.Tensor, order: list[int], positions: list[int], features: FeatureSet | None = None
    ) -> list[int]:
        """Sample these lanes both ways, two rows of padding behind them; returns the tokens."""
        together = features or self.features.of(order)
        assert isinstance(together, FeatureSet)
        rows = [*order, self.num_lanes, self.num_lanes]
        padded = torch.cat([logits, logits[:1].expand(2, -1)])
        results = torch.zeros(2, len(rows), dtype=torch.int64)
        places = torch.tensor([*positions, 1, 1], dtype=torch.int32) - 1
        self.sampler.sample(together, padded, torch.tensor(rows, dtype=torch.int32), places, results)
        expected = self.eager.sample(logits, order, positions)
        self.eager_lanes.record(order, expected.token_ids)
        assert results[0, : len(order)].tolist() == expected.token_ids.tolist()
        assert results[1, : len(order)].bool().tolist() == expected.finite.tolist()
        assert self.lanes.last_tokens[torch.tensor(order)].tolist() == expected.token_ids.tolist()
        if together.logprobs:
            counts = self.features.logprob_counts(order)
            found = read_logprobs(
                self.logprobs.values, self.logprobs.ids, expected.token_ids.tolist(), range(len(order)), counts
            )
            assert found == list(expected.logprobs or [None] * len(order))
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


@pytest.mark.parametrize("features", list(FeatureSet.every()), ids=str)
def test_a_graph_that_does_more_than_a_lane_needs_changes_nothing(features: FeatureSet) -> None:
    """A greedy lane and one that draws, by every graph that may serve them."""
    twins = Twins(2)
    plain = [SamplingParams(temperature=0), SamplingParams(temperature=0.8)]
    twins.start([lane_start(lane, params) for lane, params in enumerate(plain)])
    order = [0] if features.choice is Choice.GREEDY else [1, 0]
    for step in range(3):
        logits = 3 * torch.randn(len(order), VOCAB_SIZE, generator=torch.Generator().manual_seed(step))
        twins.compare(logits, order, [5 + step] * len(order), features)


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


def test_what_exceeds_a_capacity_is_named() -> None:
    features = LaneFeatures(3, 2000)
    over = dict.fromkeys(range(BIAS_CAPACITY + 1), 1.0)
    many = LaneStart(1, 0, SamplingParams(min_tokens=1), 0, 0, [1], [], frozenset(range(ENDING_CAPACITY + 1)))
    features.start([lane_start(0, SamplingParams(logit_bias=over)), many])
    features.start([lane_start(2, SamplingParams(logprobs=LOGPROBS_CAPACITY + 1))])
    assert [features.of([lane]) for lane in range(3)] == [
        "a logit_bias of more than 512 tokens",
        "min_tokens with more than 64 ending tokens",
        "more than 20 log-probabilities",
    ]
    features.start([lane_start(0, SamplingParams(logprobs=LOGPROBS_CAPACITY))])
    assert features.of([0]) == FeatureSet(Choice.DRAW, Adjustment.NONE, True)
    assert features.of([0, 2]) == "more than 20 log-probabilities"


@pytest.mark.parametrize("choice", Choice)
def test_a_broken_row_gives_a_token_of_the_vocabulary(choice: Choice) -> None:
    """The next step is under way with it already: its embedding must exist."""
    twins = Twins(3)
    twins.start([lane_start(lane, SamplingParams(seed=lane, repetition_penalty=2.0)) for lane in range(3)])
    results = torch.zeros(2, 3, dtype=torch.int64)
    logits = random_logits(3, VOCAB_SIZE, seed=3)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    features = FeatureSet(choice, Adjustment.PENALTIES, True)
    for position in range(20):
        lanes = torch.arange(3, dtype=torch.int32)
        twins.sampler.sample(features, logits, lanes, torch.full((3,), position, dtype=torch.int32), results)
        assert results[1].tolist() == [0, 0, 1]
        assert int(results[0].max()) < VOCAB_SIZE


@given(st.integers(1, 5 * BLOCK_LEN), st.integers(1, 20), st.integers(0, 10_000))
def test_the_most_probable_are_in_order_whatever_ties(vocab_size: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    choices = torch.tensor([-1.5, -0.0, 0.0, 0.5, 0.5, 2.0, -torch.inf])[: 1 + seed % 7]
    padded = torch.full((3, vocab_size + -vocab_size % BLOCK_LEN), -torch.inf)
    padded[:, :vocab_size] = choices[torch.randint(len(choices), (3, vocab_size), generator=generator)]
    count = min(count, vocab_size)
    ids, largest = most_probable(padded, count)
    expected = padded.sort(dim=-1, descending=True, stable=True)
    assert ids.tolist() == expected.indices[:, :count].tolist()
    assert largest.tolist() == expected.values[:, :count].tolist()
