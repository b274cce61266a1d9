"""Stacks of matrices: each kernel against products one by one, and those against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_llm.device.cpu_levels import LEVEL_VARIABLE, levels_to_try
from cascade_llm.weights.format import MatrixSpec, StoredTensor
from cascade_llm.weights.packed import Packed
from cascade_llm.weights.packed_stack import PackedStack
from cascade_llm.weights.row_major import RowMajor, RowMajorStack
from cascade_llm.weights.stack import Grouped, MatrixStack, OneByOne
from cascade_llm.weights.stacked_linear import StackedLinear
from tests.native_code import expect_native
from tests.weights.matrices import matrix_spec, random_codes, stored_codes
from tests.weights.test_packed import LAYOUTS

PARTS = {"gate": 37, "up": 20}
DTYPES = (torch.float32, torch.bfloat16)


def tensors(count: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Plain values of the parts of some matrices."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            part: torch.randn(rows, inputs, generator=generator).mul_(inputs**-0.5).to(dtype)
            for part, rows in PARTS.items()
        }
        for _ in range(count)
    ]


def loaded(
    spec: MatrixSpec, stored: list[dict[str, StoredTensor]], *, bias: torch.Tensor | None = None
) -> StackedLinear:
    """A layer with these parts."""
    linear = StackedLinear(spec, len(stored), bias=bias is not None)
    for index, parts in enumerate(stored):
        for part, tensor in parts.items():
            linear.load(index, part, tensor)
            if bias is not None:
                linear.load_bias(index, part, StoredTensor.plain(bias[index, spec.rows_of(part)]))
    return linear


def plain(values: list[dict[str, torch.Tensor]]) -> list[dict[str, StoredTensor]]:
    return [{part: StoredTensor.plain(tensor) for part, tensor in parts.items()} for parts in values]


def expected(
    x: torch.Tensor, weights: list[torch.Tensor], counts: list[int], sources: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """In float64."""
    owners = torch.tensor([index for index, count in enumerate(counts) for _ in range(count)])
    y = torch.stack([F.linear(x[s].double(), weights[o].double()) for s, o in zip(sources, owners, strict=True)])
    return y if bias is None else y + bias[owners].double()


def ends_of(counts: list[int]) -> torch.Tensor:
    return torch.tensor(counts).cumsum(0).int()


CASE = {
    "counts": st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any),
    "inputs": st.sampled_from([32, 64, 160]),
    "dtype": st.sampled_from(DTYPES),
    "has_bias": st.booleans(),
    "seed": st.integers(0, 99),
}


@torch.inference_mode()
@settings(max_examples=25, deadline=None)
@given(stored_as=st.sampled_from(DTYPES), **CASE)
def test_plain_values_as_they_lie_have_the_products_of_their_values(
    stored_as: torch.dtype, counts: list[int], inputs: int, dtype: torch.dtype, has_bias: bool, seed: int
) -> None:
    spec = matrix_spec(inputs - 3 * (seed % 2), PARTS, dtype)
    values = tensors(len(counts), spec.in_features, stored_as, seed)
    bias = torch.randn(len(counts), spec.out_features).to(dtype) if has_bias else None
    linear = loaded(spec, plain(values), bias=bias)
    expect_native(*RowMajor.reasons_against(spec, plain(values)[0]))
    assert isinstance(linear.matrix, RowMajorStack)
    x = torch.randn(5, spec.in_features).to(dtype)
    sources = torch.randint(5, (sum(counts),))
    weights = [
        torch.cat(list(parts.values())).to(stored_as if stored_as == torch.bfloat16 else dtype) for parts in values
    ]
    wanted = expected(x, weights, counts, sources, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    got = linear(x, ends_of(counts), sources)
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    assert torch.equal(linear(x[sources], ends_of(counts)), got)


@torch.inference_mode()
@settings(max_examples=25, deadline=None)
@given(name=st.sampled_from(sorted(LAYOUTS)), other=st.sampled_from(sorted(LAYOUTS)), is_exact=st.booleans(), **CASE)
def test_packed_matrices_have_the_products_of_each_alone(
    name: str,
    other: str,
    is_exact: bool,
    counts: list[int],
    inputs: int,
    dtype: torch.dtype,
    has_bias: bool,
    seed: int,
) -> None:
    spec = matrix_spec(512, PARTS, dtype, exact_activations=is_exact)
    generator = torch.Generator().manual_seed(seed)
    kinds = [LAYOUTS[(name, other)[index % 2]] for index in range(len(counts))]
    stored = [
        {part: stored_codes(random_codes(kind, rows, 512, generator)) for part, rows in PARTS.items()} for kind in kinds
    ]
    expect_native(*Packed.reasons_against(spec, stored[0]))
    matrices = [Packed(spec, parts) for parts in stored]
    assert PackedStack.holds(matrices)
    bias = torch.randn(len(counts), spec.out_features).to(dtype) if has_bias else None
    x, sources, ends = torch.randn(5, 512).to(dtype), torch.randint(5, (sum(counts),)), ends_of(counts)
    each, together = OneByOne(list(matrices), spec.out_features), PackedStack(matrices)
    got = together.multiply(x, ends, sources, bias)
    assert torch.equal(got, each.multiply(x, ends, sources, bias))
    assert torch.equal(got, together.multiply(x[sources], ends, bias=bias))


def stacks_of_many_rows() -> list[tuple[MatrixStack, MatrixStack, int]]:
    """Two ways to multiply the same matrices, and their inputs."""
    spec = matrix_spec(256, PARTS, torch.bfloat16)
    rows = [RowMajor(spec, parts) for parts in plain(tensors(2, 256, torch.bfloat16))]
    generator = torch.Generator().manual_seed(1)
    codes = [
        Packed(
            spec, {part: stored_codes(random_codes(LAYOUTS["Q4_K"], n, 256, generator)) for part, n in PARTS.items()}
        )
        for _ in range(2)
    ]
    stacks: list[tuple[MatrixStack, MatrixStack, int]] = [
        (RowMajorStack(rows), OneByOne(list(rows), spec.out_features), 256),
        (PackedStack(codes), OneByOne(list(codes), spec.out_features), 256),
    ]
    return stacks


@torch.inference_mode()
def test_more_rows_than_a_pass_takes() -> None:
    spec = matrix_spec(256, PARTS, torch.bfloat16)
    expect_native(*Packed.reasons_against(spec, {}), *RowMajor.reasons_against(spec, {}))
    for together, each, inputs in stacks_of_many_rows():
        x, ends = torch.randn(1700, inputs).bfloat16(), torch.tensor([1501, 1700], dtype=torch.int32)
        assert torch.equal(together.multiply(x, ends), each.multiply(x, ends))
        one = torch.tensor([1, 1], dtype=torch.int32)  # a row's arithmetic does not depend on the rows beside it
        assert torch.equal(together.multiply(x[7:8], one)[0], together.multiply(x, ends)[7])


@torch.inference_mode()
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_product_of_a_gpu_on_the_cpu(has_bias: bool) -> None:
    spec = matrix_spec(64, {"gate": 24, "up": 16}, torch.bfloat16)
    stack, each = Grouped(spec, 5), []
    generator = torch.Generator().manual_seed(0)
    for index in range(5):
        parts = {
            part: stored_codes(random_codes(LAYOUTS["Q4_0"], rows, 64, generator)) for part, rows in spec.parts.items()
        }
        stack.put(index, parts)
        each.append(torch.cat([stored.values() for stored in parts.values()]).bfloat16())
    counts = [3, 0, 1, 0, 7]
    bias = torch.randn(5, 40).bfloat16() if has_bias else None
    x, sources = torch.randn(4, 64).bfloat16(), torch.randint(4, (11,))
    got = stack.multiply(x, ends_of(counts), sources, bias)
    torch.testing.assert_close(got.double(), expected(x, each, counts, sources, bias), rtol=2e-2, atol=5e-2)


def test_values_stay_in_the_checkpoint_where_they_are_stored_so() -> None:
    spec = matrix_spec(64, PARTS, torch.bfloat16)
    values = tensors(1, 64, torch.bfloat16)[0]
    expect_native(*RowMajor.reasons_against(spec, plain([values])[0]))
    matrix = RowMajor(spec, plain([values])[0])
    assert [held.data_ptr() for held in matrix.values] == [tensor.data_ptr() for tensor in values.values()]
    rounded = loaded(matrix_spec(64, PARTS, torch.bfloat16, quantization="int4"), plain([values]))
    assert "u4" in rounded.matrix.describe()


@pytest.mark.slow
def test_every_level_of_processor_has_these_products() -> None:
    for level in levels_to_try():
        tests = [__file__ + "::" + name for name in globals() if name.startswith("test_") and "every" not in name]
        environment = {**os.environ, LEVEL_VARIABLE: level.name}
        subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", *tests], check=True, env=environment)
