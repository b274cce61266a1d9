from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.sampling.draw import (
    BLOCK_LEN,
    Filters,
    draw,
    draw_key,
    keep,
    softmax_weights,
    uniforms,
)
from cascade_llm.sampling.native_sampler import NativeSampler
from tests.native_code import needs_compiler
from tests.sampling.reference_sampler import kept_weights

VOCAB_SIZE = 2560
implementations = pytest.mark.parametrize(
    "native", [False, pytest.param(True, marks=needs_compiler)], ids=["torch", "native"]
)


def drawn(native: bool, weights: torch.Tensor, uniform: torch.Tensor, filters: Filters) -> list[int]:
    """The tokens of rows by either implementation."""
    if native:
        sampler = NativeSampler.for_device(torch.device("cpu"))
        assert sampler is not None
        return sampler.draw(weights, uniform, filters).tolist()
    return draw(keep(weights, filters), uniform).tolist()


def test_uniforms_are_splitmix64() -> None:
    """The published outputs of SplitMix64 for the seed 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    numbers = uniforms(torch.full((4,), 1234567), torch.arange(4))
    assert numbers.tolist() == [(output >> 11) * 2.0**-53 for output in published]


def test_uniforms_are_uniform_and_streams_unrelated() -> None:
    keys = torch.tensor([draw_key(seed, index) for seed in range(8) for index in range(8)])
    assert len(set(keys.tolist())) == 64
    numbers = uniforms(keys[:, None], torch.arange(4096)[None])
    assert numbers.dtype == torch.float64
    assert ((numbers >= 0) & (numbers < 1)).all()
    assert (numbers.mean(-1) - 0.5).abs().max() < 5 * (1 / 12 / 4096) ** 0.5
    correlation = torch.corrcoef(numbers) - torch.eye(64, dtype=torch.float64)
    assert correlation.abs().max() < 5 / 4096**0.5


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**31))
def test_any_seed_makes_a_key(seed: int, sample_index: int) -> None:
    key = draw_key(seed, sample_index)
    assert -(2**63) <= key < 2**63
    assert key == draw_key(seed, sample_index)
    assert key != draw_key(seed, sample_index + 1)


@implementations
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
def test_only_tokens_with_weight_are_drawn(uniform: float, native: bool) -> None:
    weights = torch.zeros(3, VOCAB_SIZE)
    weights[0, [700, 1500]] = torch.tensor([0.25, 0.75])
    weights[1, 0], weights[2, -1] = 1.0, 1.0
    numbers = torch.full((3,), uniform, dtype=torch.float64)
    expected = [1500 if uniform >= 0.25 else 700, 0, VOCAB_SIZE - 1]
    for filters in (all_rows(3), all_rows(3, top_p=0.9999), all_rows(3, top_k=9), all_rows(3, min_p=0.1)):
        assert drawn(native, weights, numbers, filters) == expected


def all_rows(num_rows: int, top_k: int = VOCAB_SIZE, top_p: float = 1.0, min_p: float = 0.0) -> Filters:
    return Filters(
        torch.full((num_rows,), top_k),
        torch.full((num_rows,), top_p, dtype=torch.float64),
        torch.full((num_rows,), min_p, dtype=torch.float64),
    )


def probabilities(num_rows: int, scale: float, quantum: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(scale * 10))
    logits = torch.randn(num_rows, VOCAB_SIZE, generator=generator) * scale
    return torch.softmax((logits / quantum).round() * quantum, -1)


def slowly_drawn(weights: torch.Tensor, uniform: torch.Tensor, filters: Filters) -> list[int]:
    """Python's sort and sums."""
    tokens = []
    for row, number, *fields in zip(
        weights.tolist(),
        uniform.tolist(),
        filters.top_k.tolist(),
        filters.top_p.tolist(),
        filters.min_p.tolist(),
        strict=True,
    ):
        kept = kept_weights(row, *fields)
        target, reached = number * math.fsum(kept.values()), 0.0
        chosen = -1
        for token_id, weight in kept.items():
            if reached <= target:
                chosen, reached = token_id, reached + weight
        tokens.append(chosen)
    return tokens


@implementations
@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("quantum", [0.25, 2.0**-10])
@pytest.mark.parametrize(
    ("top_p", "min_p"), [(0.05, 0.0), (0.5, 0.0), (0.95, 0.0), (0.9999, 0.0), (0.9, 0.02), (1.0, 0.3)]
)
@pytest.mark.parametrize("top_k", [1, 20, 500, VOCAB_SIZE])
def test_draws_are_those_of_a_sorted_list(
    scale: float, quantum: float, top_p: float, min_p: float, top_k: int, native: bool
) -> None:
    weights = probabilities(8, scale, quantum)
    uniform = torch.linspace(0, 1 - 1e-9, 8, dtype=torch.float64)
    filters = all_rows(8, top_k, top_p, min_p)
    assert drawn(native, weights, uniform, filters) == slowly_drawn(weights, uniform, filters)


@implementations
def test_filters_that_keep_all_draw_as_no_filter(native: bool) -> None:
    weights = probabilities(64, 1.0, 2.0**-10)
    uniform = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = drawn(native, weights, uniform, all_rows(64))
    assert draw(weights, uniform).tolist() == plain
    assert torch.equal(keep(weights, all_rows(64)), weights)
    assert drawn(native, weights, uniform, all_rows(64, min_p=1e-30)) == plain
    assert drawn(native, weights, uniform, all_rows(64, top_p=1 - 1e-12)) == plain


@implementations
def test_ties_at_the_boundary_keep_the_lowest_ids(native: bool) -> None:
    weights = torch.zeros(1, VOCAB_SIZE)
    weights[0, [2000, 1000, 3, 500]] = 0.25
    spread = torch.linspace(0, 1 - 1e-9, 16, dtype=torch.float64)

    def kept(filters: Filters) -> set[int]:
        return set(drawn(native, weights.repeat(16, 1), spread, filters))

    assert kept(all_rows(16, top_k=2)) == {3, 500}
    assert kept(all_rows(16, top_p=0.5)) == {3, 500}
    assert kept(all_rows(16, top_p=0.51)) == {3, 500, 1000}
    assert kept(all_rows(16, top_k=3, top_p=0.5)) == {3, 500}


def test_draws_at_a_temperature_invert_the_cdf_of_float64() -> None:
    generator = torch.Generator().manual_seed(5)
    for scale in (0.1, 3.0, 30.0):
        logits = torch.randn(400, VOCAB_SIZE, generator=generator) * scale
        logits[:, 2500:] = -torch.inf
        temperature = torch.rand(400, generator=generator, dtype=torch.float64) * 2 + 0.01
        uniform = torch.rand(400, generator=generator, dtype=torch.float64)
        cdf = torch.softmax(logits.double() / temperature[:, None], -1).cumsum(-1)
        token_ids = draw(softmax_weights(logits, logits.amax(-1), temperature), uniform)
        high = cdf.gather(1, token_ids[:, None])[:, 0]
        low = torch.where(token_ids > 0, cdf.gather(1, (token_ids - 1).clamp(min=0)[:, None])[:, 0], 0.0)
        assert bool((uniform >= low - 1e-6).all())
        assert bool((uniform <= high + 1e-6).all())


def test_temperature_zero_draws_a_maximum_and_a_row_that_is_not_finite_any_token() -> None:
    logits = torch.zeros(4, VOCAB_SIZE)
    logits[0, 77] = logits[1, 2559] = 1.0
    logits[2, 5], logits[3, 9] = torch.inf, torch.nan
    uniform = torch.full((4,), 0.999, dtype=torch.float64)
    weights = softmax_weights(logits, logits.amax(-1), torch.zeros(4, dtype=torch.float64))
    for token_ids in (draw(weights, uniform), draw(keep(weights, all_rows(4, 5, 0.9, 0.1)), uniform)):
        assert token_ids[:2].tolist() == [77, 2559]
        assert all(0 <= token_id < VOCAB_SIZE for token_id in token_ids.tolist())


@implementations
@pytest.mark.parametrize("total", [1.0, 1.0 + 2.0**-20, 0.999])
def test_the_largest_uniform_number_draws_the_last_token_with_weight(total: float, native: bool) -> None:
    """Also where its product with the sum rounds to the sum, and blocks of nothing follow."""
    weights = torch.zeros(1, VOCAB_SIZE)
    weights[0, 3], weights[0, BLOCK_LEN + 1] = 0.5, total - 0.5
    uniform = torch.full((1,), 1.0 - 2.0**-53, dtype=torch.float64)
    assert drawn(native, weights, uniform, all_rows(1)) == [BLOCK_LEN + 1]
