from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.runner import draw as module
from cascade_llm.runner.candidates import block_maxima
from cascade_llm.runner.draw import Filters, draw, draw_key, draw_min_p, draw_top_k, draw_top_p, uniforms
from cascade_llm.runner.workspace import Workspace

VOCAB_SIZE = 2560


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


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1.0 - 2.0**-53])
def test_only_tokens_with_weight_are_drawn(uniform: float) -> None:
    weights = torch.zeros(3, VOCAB_SIZE)
    weights[0, [700, 1500]] = torch.tensor([0.25, 0.75])
    weights[1, 0], weights[2, -1] = 1.0, 1.0
    numbers = torch.full((3,), uniform, dtype=torch.float64)
    assert draw(weights, numbers).tolist() == [1500 if uniform >= 0.25 else 700, 0, VOCAB_SIZE - 1]
    filters = all_rows(3, top_p=0.9999)
    assert draw_top_p(weights, numbers, filters, Workspace()).tolist() == draw(weights, numbers).tolist()


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


def everything(weights: torch.Tensor) -> module.Candidates:
    """All tokens as candidates: what follows sorts the whole vocabulary."""
    floor = torch.full((len(weights),), module.SMALLEST_WEIGHT)
    return module.Candidates.select(weights, block_maxima(weights), floor)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
@pytest.mark.parametrize("quantum", [0.25, 2.0**-10])
@pytest.mark.parametrize(
    ("top_p", "min_p"), [(0.05, 0.0), (0.5, 0.0), (0.95, 0.0), (0.9999, 0.0), (0.9, 0.02), (1.0, 0.3)]
)
@pytest.mark.parametrize("top_k", [1, 20, 500, VOCAB_SIZE])
def test_few_candidates_or_the_whole_vocabulary_give_one_token(
    scale: float, quantum: float, top_p: float, min_p: float, top_k: int
) -> None:
    weights = probabilities(8, scale, quantum)
    uniform = torch.linspace(0, 1 - 1e-9, 8, dtype=torch.float64)
    filters = all_rows(8, top_k, top_p, min_p)
    if top_k < VOCAB_SIZE:
        quick, mass = draw_top_k, None
    else:
        quick = draw_top_p if top_p < 1.0 else draw_min_p
        mass = weights.view(8, -1, module.BLOCK_LEN).sum(-1).sum(-1, dtype=torch.float64)
    slow = module._draw_candidates(everything(weights), uniform, filters, mass)
    assert torch.equal(quick(weights, uniform, filters, Workspace()), slow)


def test_filters_that_keep_all_draw_as_no_filter() -> None:
    weights = probabilities(64, 1.0, 2.0**-10)
    uniform = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain = draw(weights, uniform)
    assert torch.equal(draw_top_k(weights, uniform, all_rows(64), Workspace()), plain)
    assert torch.equal(draw_min_p(weights, uniform, all_rows(64, min_p=1e-30), Workspace()), plain)


def test_ties_at_the_boundary_keep_the_lowest_ids() -> None:
    weights = torch.zeros(1, VOCAB_SIZE)
    weights[0, [2000, 1000, 3, 500]] = 0.25
    spread = torch.linspace(0, 1 - 1e-9, 16, dtype=torch.float64)

    def drawn(filters: Filters) -> set[int]:
        quick = draw_top_k if int(filters.top_k[0]) < VOCAB_SIZE else draw_top_p
        return set(quick(weights.repeat(16, 1), spread, filters, Workspace()).tolist())

    assert drawn(all_rows(16, top_k=2)) == {3, 500}
    assert drawn(all_rows(16, top_p=0.5)) == {3, 500}
    assert drawn(all_rows(16, top_p=0.51)) == {3, 500, 1000}
    assert drawn(all_rows(16, top_k=3, top_p=0.5)) == {3, 500}
