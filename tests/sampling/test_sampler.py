from __future__ import annotations

import random
from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.plan import LaneStart
from cascade_llm.sampling.draw import draw_key, uniforms
from cascade_llm.sampling.lanes import LaneState
from cascade_llm.sampling.native_sampler import reason_against_native_sampler
from cascade_llm.sampling.sampler import SampledTokens, Sampler
from cascade_llm.sampling_params import SamplingParams
from tests.native_code import expect_native, needs_compiler
from tests.sampling.reference_sampler import acceptable_tokens, adjusted_logits, kept_probabilities
from tests.sampling.sampling_cases import PROMPT_LEN, lane_start, random_logits, starts

pytestmark = pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=needs_compiler)], ids=["torch", "native"]
)


@pytest.fixture(autouse=True)
def native_where_asked(compiled: bool) -> None:
    if compiled:
        expect_native(reason_against_native_sampler(torch.device("cpu")))


def lanes_of(vocab_size: int, lane_starts: list[LaneStart]) -> LaneState:
    lanes = LaneState(len(lane_starts), vocab_size)
    lanes.start(lane_starts)
    return lanes


def next_position(start: LaneStart) -> int:
    return len(start.prompt_token_ids) + len(start.output_token_ids)


def sample_all(logits: torch.Tensor, lane_starts: list[LaneStart], compiled: bool) -> SampledTokens:
    """Each start's next token, start i from row i."""
    lanes = lanes_of(logits.shape[1], lane_starts)
    return Sampler(lanes, compiled=compiled).sample(
        logits, range(len(lane_starts)), [next_position(start) for start in lane_starts], range(len(lane_starts))
    )


def uniform_of(start: LaneStart) -> float:
    key = torch.tensor([draw_key(start.seed, start.sample_index)])
    return float(uniforms(key, torch.tensor([next_position(start)])))


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[LaneStart]]:
    vocab_size = draw(st.sampled_from([4, 128, 300, 1000]))
    lane_starts = draw(starts(vocab_size, draw(st.integers(1, 6))))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    scale = draw(st.sampled_from([0.0, 0.5, 3.0]))
    return random_logits(len(lane_starts), vocab_size, draw(st.integers(0, 99)), scale=scale, dtype=dtype), lane_starts


@given(batches())
def test_a_mixed_batch_is_as_the_slow_twin_says(compiled: bool, batch: tuple[torch.Tensor, list[LaneStart]]) -> None:
    logits, lane_starts = batch
    sampled = sample_all(logits, lane_starts, compiled)
    assert bool(sampled.finite.all())
    for row, start in enumerate(lane_starts):
        expected = acceptable_tokens(logits[row].tolist(), start, start.output_token_ids, uniform_of(start))
        assert int(sampled.token_ids[row]) in expected


def varied_starts(num_lanes: int) -> list[LaneStart]:
    """Greedy, plain, filtered and penalized lanes, side by side."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_p": 0.95},
        {"temperature": 1.5, "top_p": 0.99, "min_p": 0.01},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.3},
        {"temperature": 0.0, "presence_penalty": 1.1, "frequency_penalty": 0.3},
        {"temperature": 1.0, "top_k": 3000, "logit_bias": {5: 4.0}, "min_tokens": 9},
    ]
    return [
        lane_start(lane, SamplingParams(**kinds[lane % len(kinds)]), seed=lane, output=[lane, lane, 9])  # type: ignore[arg-type]
        for lane in range(num_lanes)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_its_batch(compiled: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(64, 5003, generator=generator) * 2.5).to(dtype)
    lanes = lanes_of(5003, varied_starts(64))
    sampler, order = Sampler(lanes, compiled=compiled), list(range(64))
    together = sampler.sample(logits, order, [8] * 64).token_ids
    alone = torch.cat([sampler.sample(logits[i : i + 1], [i], [8]).token_ids for i in order])
    assert torch.equal(together, alone)
    for seed in range(3):
        random.Random(seed).shuffle(order)
        part = order[: 20 * (seed + 1)]
        assert torch.equal(sampler.sample(logits[part], part, [8] * len(part)).token_ids, together[part])
        assert torch.equal(sampler.sample(logits, part, [8] * len(part), rows=part).token_ids, together[part])


def test_more_rows_than_one_chunk(compiled: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 200_000, generator=generator).to(torch.bfloat16)
    lanes = lanes_of(200_000, varied_starts(40))
    together = Sampler(lanes, compiled=compiled).sample(logits, range(40), [8] * 40).token_ids
    alone = torch.cat(
        [Sampler(lanes, compiled=compiled).sample(logits[i : i + 1], [i], [8]).token_ids for i in range(40)]
    )
    assert torch.equal(together, alone)


def test_columns_may_be_arrays_and_views(compiled: bool) -> None:
    lanes = lanes_of(300, varied_starts(8))
    logits = random_logits(8, 300, seed=1)
    column = memoryview(array("i", range(8))).toreadonly()
    positions = memoryview(array("i", [8] * 8))
    sampled = Sampler(lanes, compiled=compiled).sample(logits, column, positions, rows=column)
    assert torch.equal(sampled.token_ids, Sampler(lanes, compiled=compiled).sample(logits, range(8), [8] * 8).token_ids)
    lanes.record(column, sampled.token_ids)
    assert torch.equal(lanes.last_tokens[:-1], sampled.token_ids)


def test_no_samples_at_all(compiled: bool) -> None:
    sampled = Sampler(LaneState(2, 300), compiled=compiled).sample(torch.zeros(0, 300), [], [])
    assert sampled.token_ids.shape == sampled.finite.shape == (0,)
    assert not sampled.logprobs


def test_the_first_of_equal_maxima_is_greedy(compiled: bool) -> None:
    logits = torch.zeros(3, 1000, dtype=torch.bfloat16)
    logits[0, [999, 700, 130]] = 2.0
    logits[1, [512, 511]] = 1.0
    logits[2] = -torch.inf
    logits[2, 998:] = -5.0
    sampled = sample_all(logits, [lane_start(i, SamplingParams(temperature=0)) for i in range(3)], compiled)
    assert sampled.token_ids.tolist() == [130, 511, 998]
    assert sampled.finite.tolist() == [True] * 3


@pytest.mark.parametrize("kind", range(8))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_that_are_not_finite_are_flagged_and_harm_no_other_row(
    compiled: bool, kind: int, dtype: torch.dtype
) -> None:
    start = varied_starts(8)[kind]
    lane_starts = [lane_start(i, start.params, output=[1]) for i in range(5)]
    logits = random_logits(5, 300, seed=3, dtype=dtype)
    clean = sample_all(logits, lane_starts, compiled)
    broken = logits.clone()
    broken[0, 17], broken[1, 299], broken[2] = torch.nan, torch.inf, -torch.inf
    broken[4, 200:] = torch.where(torch.arange(100) % 2 == 0, broken[4, 200:], -torch.inf)
    sampled = sample_all(broken, lane_starts, compiled)
    assert sampled.finite.tolist() == [False, False, False, True, True]
    assert clean.finite.all()
    assert sampled.token_ids[3] == clean.token_ids[3]
    assert ((sampled.token_ids >= 0) & (sampled.token_ids < 300)).all()
    assert broken[4, sampled.token_ids[4]] > -torch.inf


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-3, 1e6])
def test_extreme_temperatures(compiled: bool, temperature: float) -> None:
    logits = random_logits(1, 300, seed=0).repeat(32, 1)
    logits[:, 77] = 40.0
    lane_starts = [lane_start(i, SamplingParams(temperature=temperature), seed=i) for i in range(32)]
    sampled = sample_all(logits, lane_starts, compiled)
    assert sampled.finite.all()
    if temperature < 1:
        assert sampled.token_ids.tolist() == [77] * 32
    else:
        assert len(set(sampled.token_ids.tolist())) > 20


DISTRIBUTIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 12},
    {"temperature": 1.0, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 1.0, "min_p": 0.1, "presence_penalty": 0.5, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("fields", DISTRIBUTIONS)
def test_draws_follow_the_distribution(compiled: bool, fields: dict[str, float]) -> None:
    """Chi-square of 10000 draws at consecutive positions of one sequence; the bound is 5 sigma."""
    num_draws, vocab_size = 10_000, 60
    start = lane_start(0, SamplingParams(**fields), seed=11, output=[4, 4, 8])  # type: ignore[arg-type]
    logits = random_logits(1, vocab_size, seed=5, scale=1.5)
    sampler = Sampler(lanes_of(vocab_size, [start]), compiled=compiled)
    positions = range(PROMPT_LEN + 3, PROMPT_LEN + 3 + num_draws)
    tokens = sampler.sample(logits, [0] * num_draws, positions, rows=[0] * num_draws).token_ids
    observed = torch.bincount(tokens, minlength=vocab_size).tolist()
    adjusted = adjusted_logits(logits[0].tolist(), start, start.output_token_ids)
    expected = kept_probabilities(adjusted, start.params)
    assert sum(observed[token_id] for token_id in expected) == num_draws
    chi_square = sum((observed[i] - num_draws * p) ** 2 / (num_draws * p) for i, p in expected.items())
    freedom = len(expected) - 1
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_samples_of_one_prompt_differ_and_repeat(compiled: bool) -> None:
    logits = random_logits(1, 300, seed=2, scale=0.5)
    lane_starts = [lane_start(i, SamplingParams(), seed=5, sample_index=i) for i in range(16)]
    sampler = Sampler(lanes_of(300, lane_starts), compiled=compiled)
    tokens = sampler.sample(logits, range(16), [5] * 16, rows=[0] * 16).token_ids
    assert len(set(tokens.tolist())) > 8
    assert torch.equal(tokens, sampler.sample(logits, range(16), [5] * 16, rows=[0] * 16).token_ids)
    assert not torch.equal(tokens, sampler.sample(logits, range(16), [6] * 16, rows=[0] * 16).token_ids)


def test_min_tokens_masks_ending_tokens_until_reached(compiled: bool) -> None:
    logits = torch.zeros(1, 300)
    logits[0, 3] = 50.0
    for temperature in (0.0, 1.0):
        start = lane_start(0, SamplingParams(temperature=temperature, min_tokens=2))
        sampler = Sampler(lanes_of(300, [start]), compiled=compiled)
        tokens = [int(sampler.sample(logits, [0], [PROMPT_LEN + i]).token_ids) for i in range(4)]
        assert tokens[0] != 3
        assert tokens[1] != 3
        assert tokens[2:] == [3, 3]


def test_logprobs_are_the_raw_models_and_only_of_those_who_asked(compiled: bool) -> None:
    logits = random_logits(4, 300, seed=8, dtype=torch.bfloat16)
    common = {"temperature": 0.5, "logit_bias": {7: 100.0}}
    lane_starts = [lane_start(i, SamplingParams(logprobs=n, **common)) for i, n in enumerate([None, 0, 3, 300])]  # type: ignore[arg-type]
    sampled = sample_all(logits, lane_starts, compiled)
    assert sampled.token_ids.tolist() == [7] * 4
    expected = torch.log_softmax(logits.double(), -1)[:, 7]
    assert sampled.logprobs[0] is None
    for row, num_top in ((1, 0), (2, 3), (3, 300)):
        report = sampled.logprobs[row]
        assert report is not None
        assert report.token_id == 7
        assert report.logprob == pytest.approx(float(expected[row]), abs=1e-5)
        assert report.rank == 1 + int((logits[row] > logits[row, 7]).sum())
        assert len(report.top) == num_top
    assert sample_all(logits, lane_starts[:1], compiled).logprobs == ()
