from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_llm.errors import CheckpointError, ConfigError
from cascade_llm.weights.quantize import QUANTIZERS, quantized_rows

ERRORS = {"q8_0": 0.007, "q4_k": 0.08, "int8": 0.012, "int4": 0.085, "fp8": 0.03}
"""Of normal weights, root mean square over that of the weights."""
STEPS = {"q8_0": 1 / 127, "int8": 1 / 127, "int4": 2 / 15, "fp8": 1 / 14, "q4_k": 1 / 3}
"""Largest error of a value, at most, over the largest magnitude of its matrix; those of half a step are half of it."""
ODD_SHAPES = {"q8_0": (3, 96), "q4_k": (3, 768), "int8": (3, 37), "int4": (5, 160), "fp8": (131, 200)}


def weights(seed: int, *shape: int, scale: float = 0.05) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("method", QUANTIZERS)
def test_normal_weights_keep_most_of_what_they_are(method: str) -> None:
    values = weights(0, 160, 1024)
    error = quantized_rows(method, values).dequantized() - values
    assert 0 < error.square().mean().sqrt() / values.square().mean().sqrt() < ERRORS[method]


def test_a_search_beats_the_grid_between_the_ends() -> None:
    """Of "q4_k": with scales of 6 bits it is no worse than int4, whose scales are exact to 11."""
    values = weights(1, 64, 1024)
    errors = {name: (quantized_rows(name, values).dequantized() - values).square().mean() for name in ("q4_k", "int4")}
    assert errors["q4_k"] < errors["int4"]


@settings(max_examples=25, deadline=None)
@given(
    method=st.sampled_from(list(QUANTIZERS)),
    seed=st.integers(0, 999),
    rows=st.integers(1, 140),
    groups=st.integers(1, 3),
    scale=st.sampled_from([1e-3, 0.05, 3.0]),
    tail=st.booleans(),
)
def test_values_of_a_format_pass_through_it(
    method: str, seed: int, rows: int, groups: int, scale: float, tail: bool
) -> None:
    values = weights(seed, rows, 256 * groups, scale=scale)
    if tail:
        values = values * values.abs() / scale
    once = quantized_rows(method, values).dequantized()
    assert (once - values).abs().max() <= STEPS[method] * values.abs().max()
    assert torch.equal(quantized_rows(method, once).dequantized(), once)


@pytest.mark.parametrize("method", QUANTIZERS)
def test_shapes_dtypes_and_chunks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = weights(2, *ODD_SHAPES[method]).bfloat16()
    codes = quantized_rows(method, values)
    assert codes.codes.shape == values.shape
    assert codes.layout.group_len is not None
    assert values.shape[1] % codes.layout.group_len == 0
    whole = codes.dequantized()
    monkeypatch.setattr("cascade_llm.weights.quantize.CHUNK_LEN", 1)
    assert torch.equal(quantized_rows(method, values).dequantized(), whole)


@pytest.mark.parametrize("method", QUANTIZERS)
def test_zeros_and_constants(method: str) -> None:
    zeros = torch.zeros(ODD_SHAPES[method])
    assert torch.equal(quantized_rows(method, zeros).dequantized(), zeros)
    for constant in (0.25, -0.3, 0.02):
        values = torch.full(ODD_SHAPES[method], constant)
        error = (quantized_rows(method, values).dequantized() - values).abs().max()
        assert error <= 0.005 * abs(constant), constant
    one = zeros.clone()
    one[0, 0] = 0.5
    assert (quantized_rows(method, one).dequantized() - one).abs().max() <= 0.005


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(method: str, value: float) -> None:
    values = weights(3, *ODD_SHAPES[method])
    values[1, 2] = value
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        quantized_rows(method, values)


@pytest.mark.parametrize("method", ["q8_0", "int8", "q4_k"])
def test_what_is_too_large_for_a_scale_is_refused(method: str) -> None:
    with pytest.raises(CheckpointError, match="too large for a scale"):
        quantized_rows(method, torch.full(ODD_SHAPES[method], 1e8))


@pytest.mark.parametrize(("method", "multiple"), [("q8_0", 32), ("q4_k", 256), ("int4", 32)])
def test_inputs_that_are_no_groups_are_refused(method: str, multiple: int) -> None:
    with pytest.raises(ConfigError, match=f"multiples of {multiple} inputs, a matrix has 48"):
        quantized_rows(method, torch.ones(2, 48))
