from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.sampling import draw as torch_draw
from cascade_llm.sampling import native_sampler
from cascade_llm.sampling.draw import Filters, draw_key, uniforms
from cascade_llm.sampling.lanes import LaneState
from cascade_llm.sampling.native_sampler import NativeSampler
from cascade_llm.sampling.sampler import Sampler
from cascade_llm.sampling_params import SamplingParams
from tests.native_code import needs_compiler
from tests.sampling.sampling_cases import lane_start

pytestmark = needs_compiler


def native() -> NativeSampler:
    sampler = NativeSampler.for_device(torch.device("cpu"))
    assert sampler is not None
    return sampler


def no_filters(num_rows: int, vocab_size: int) -> Filters:
    ones = torch.ones(num_rows, dtype=torch.float64)
    return Filters(torch.full((num_rows,), vocab_size), ones, 0.0 * ones)


@st.composite
def filtered_rows(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, Filters]:
    """Weights with ties and without, whole blocks long, and filters of all kinds side by side."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    num_rows, vocab_size = draw(st.integers(1, 5)), 128 * draw(st.integers(1, 12))
    scale, quantum = draw(st.sampled_from([0.0, 0.3, 2.0, 9.0])), draw(st.sampled_from([1.0, 0.125, 2.0**-20]))
    logits = torch.randn(num_rows, vocab_size, generator=generator) * scale
    weights = torch.softmax((logits / quantum).round() * quantum, -1)
    top_ks, shares = st.integers(1, vocab_size - 1), st.sampled_from([1e-9, 0.05, 0.5, 0.9, 0.95, 0.9999, 1.0])
    filters = Filters(
        torch.tensor([draw(top_ks) for _ in range(num_rows)]),
        torch.tensor([draw(shares) for _ in range(num_rows)], dtype=torch.float64),
        torch.tensor([draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])) for _ in range(num_rows)], dtype=torch.float64),
    )
    return weights, torch.rand(num_rows, dtype=torch.float64, generator=generator), filters


@given(filtered_rows())
def test_each_draw_is_that_of_sorting_the_whole_vocabulary(case: tuple[torch.Tensor, torch.Tensor, Filters]) -> None:
    weights, uniform, filters = case
    slow = torch_draw.draw(torch_draw.keep(weights, filters), uniform)
    assert native().draw(weights, uniform, filters).tolist() == slow.tolist()


def lanes_of(vocab_size: int, params: list[SamplingParams]) -> LaneState:
    lanes = LaneState(len(params), vocab_size)
    lanes.start([lane_start(lane, each, seed=lane) for lane, each in enumerate(params)])
    return lanes


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 255, 256, 257, 1000])
def test_any_vocabulary_size(vocab_size: int) -> None:
    weights = torch.softmax(torch.linspace(-1, 1, 4 * vocab_size).view(4, vocab_size), -1)
    logits = weights.log()
    for top_k in (1, vocab_size, vocab_size + 5):
        filters = no_filters(4, vocab_size)
        filters.top_k.fill_(top_k)
        uniform = torch.full((4,), 1.0 - 2.0**-53, dtype=torch.float64)
        assert native().draw(weights, uniform, filters).tolist() == [vocab_size - 1] * 4
        lanes = lanes_of(vocab_size, [SamplingParams(top_k=top_k)] * 4)
        token_ids, finite = native().sample(logits, range(4), lanes, range(4), [9] * 4)
        assert finite.all()
        assert token_ids.tolist() == Sampler(lanes, compiled=False).sample(logits, range(4), [9] * 4).token_ids.tolist()


@pytest.mark.parametrize("temperature", [0.05, 0.8, 1.0, 30.0])
def test_weights_are_those_of_a_softmax_in_float64(temperature: float) -> None:
    """The inverse CDF at many uniform numbers gives the CDF back; a float32 weight is off by a few units."""
    vocab_size, num_draws = 40, 4000
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(1)) * 2
    lanes, positions = lanes_of(vocab_size, [SamplingParams(temperature=temperature)]), range(num_draws)
    uniform = uniforms(torch.tensor([draw_key(0, 0)]), torch.tensor(positions))
    token_ids, _ = native().sample(logits, [0] * num_draws, lanes, [0] * num_draws, positions)
    cdf = torch.softmax(logits[0].double() / temperature, -1).cumsum(-1)
    low, high = torch.searchsorted(cdf, uniform - 1e-6, right=True), torch.searchsorted(cdf, uniform + 1e-6, right=True)
    assert ((low <= token_ids) & (token_ids <= high)).all()


@pytest.mark.parametrize("dtype", native_sampler.DTYPES)
def test_argmax_orders_signs_and_zeros_as_numbers(dtype: torch.dtype) -> None:
    rows = [[-3.0, -1.0, -2.0], [-0.0, 0.0, -1.0], [-1.0, 0.0, -0.0], [-torch.inf, -1e30, -2e30]]
    logits = torch.tensor(rows, dtype=dtype)
    lanes = lanes_of(3, [SamplingParams(temperature=0)] * 4)
    token_ids, finite = native().sample(logits, range(4), lanes, range(4), [9] * 4)
    assert token_ids.tolist() == [1, 0, 1, 1]
    assert finite.all()


@pytest.mark.parametrize("dtype", native_sampler.DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [torch.nan, -torch.nan, torch.inf])
def test_what_is_not_finite_is_flagged(dtype: torch.dtype, temperature: float, poison: float) -> None:
    logits = torch.zeros(70, 70, dtype=dtype)
    logits.fill_diagonal_(poison)
    logits = torch.cat((logits, torch.zeros(1, 70, dtype=dtype)))
    lanes = lanes_of(70, [SamplingParams(temperature=temperature, top_k=1)])
    token_ids, finite = native().sample(logits, range(71), lanes, [0] * 71, [9] * 71)
    assert finite.tolist() == [False] * 70 + [True]
    assert token_ids.tolist() == [0] * 71


@pytest.mark.parametrize("dtype", native_sampler.DTYPES)
def test_any_number_of_threads_and_any_stride_give_the_same(dtype: torch.dtype) -> None:
    logits = torch.randn(9, 6000, generator=torch.Generator().manual_seed(0)).to(dtype)
    lanes = LaneState(9, 5003)
    params = [SamplingParams(temperature=t, top_p=p) for t in (0.0, 0.7, 1.3) for p in (0.5, 0.95, 1.0)]
    lanes.start([lane_start(lane, each, seed=lane) for lane, each in enumerate(params)])
    expected = Sampler(lanes).sample(logits[:, :5003].contiguous(), range(9), [5] * 9).token_ids
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            assert torch.equal(Sampler(lanes).sample(logits[:, :5003], range(9), [5] * 9).token_ids, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [0.2, 1.5, 6.0])
def test_large_rows_draw_nearly_always_what_torch_draws(scale: float) -> None:
    """Weights round differently, so a uniform number within a millionth of an edge may fall on its other side."""
    logits = (torch.randn(8, 50_000, generator=torch.Generator().manual_seed(0)) * scale).bfloat16()
    kinds = [{"top_p": 0.95}, {"top_k": 40}, {"top_k": 5000, "top_p": 0.9}, {"min_p": 0.01}, {}, {"temperature": 0.0}]
    draws = random.Random(0)
    lanes = LaneState(64, 50_000)
    params = [SamplingParams(**{"temperature": 0.8, **kinds[i % len(kinds)]}) for i in range(64)]  # type: ignore[arg-type]
    lanes.start([lane_start(i, params[i], seed=draws.getrandbits(40)) for i in range(64)])
    rows = [i % 8 for i in range(64)]
    quick = Sampler(lanes).sample(logits, range(64), [5] * 64, rows).token_ids
    slow = Sampler(lanes, compiled=False).sample(logits, range(64), [5] * 64, rows).token_ids
    assert (quick != slow).sum() <= 6
    assert (quick - slow).abs().max() <= 50
