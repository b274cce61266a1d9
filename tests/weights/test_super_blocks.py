from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_llm.weights.super_blocks import SuperBlocks, native_rounding, rounded_by_torch, rounded_natively
from tests.native_code import expect_native


def natively(values: torch.Tensor) -> SuperBlocks:
    function = native_rounding()
    expect_native("there is no rounding in C" if function is None else None)
    assert function is not None
    return rounded_natively(values, function)


def blocks_of(seed: int, count: int, kind: str, scale: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 256, generator=generator) * scale
    if kind == "tails":
        return values * values.abs() / scale
    if kind == "few values":
        return (values / scale * 2).round() * scale
    return values + 3 * scale if kind == "positive" else values


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 9),
    kind=st.sampled_from(["normal", "tails", "few values", "positive"]),
    scale=st.sampled_from([1e-9, 1e-5, 0.02, 300.0]),
)
def test_native_rounding_comes_as_close_as_its_twin(seed: int, count: int, kind: str, scale: float) -> None:
    """Codes may differ where two grids are as good; numbers stay in their range."""
    values = blocks_of(seed, count, kind, scale)
    ours, twin = natively(values), rounded_by_torch(values)
    assert ours.codes.max() <= 15
    assert ours.sub_scales.min() >= 0
    assert ours.sub_scales.max() <= 63
    assert ours.sub_minima.min() >= 0
    assert ours.sub_minima.max() <= 63
    errors = [(rounded.dequantized() - values).square().sum(1) for rounded in (ours, twin)]
    assert (errors[0] <= 1.3 * errors[1] + 1e-12 * values.square().sum(1)).all()
    once = ours.dequantized()  # another grid may hold the same numbers, to the last bits of its scales
    torch.testing.assert_close(natively(once).dequantized(), once, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", ["normal", "tails", "positive"])
def test_the_error_of_many_blocks_is_no_larger_than_the_twins(kind: str) -> None:
    values = blocks_of(3, 256, kind, 0.02)
    ours, twin = (
        (rounded.dequantized() - values).square().mean() for rounded in (natively(values), rounded_by_torch(values))
    )
    assert ours < 1.005 * twin


def test_a_block_is_rounded_the_same_whatever_is_beside_it() -> None:
    values = blocks_of(5, 131, "normal", 0.02)
    together = natively(values)
    for first, last in ((0, 1), (1, 2), (7, 130), (130, 131)):
        alone = natively(values[first:last])
        for one, all_of_them in zip(alone.tensors, together.tensors, strict=True):
            assert torch.equal(one, all_of_them[first:last])
