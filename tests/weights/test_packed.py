"""The packed products against float64, for every kind of code, and their rounding of activations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_llm.errors import CheckpointError
from cascade_llm.loader.gguf_codes import CODED_TYPES, MXFP4_VALUES
from cascade_llm.weights.codes import CodeLayout, Codes
from cascade_llm.weights.format import StoredTensor
from cascade_llm.weights.packed import Packed
from tests.native_code import needs_compiler
from tests.weights.matrices import matrix_spec, plain, random_codes, stored_codes

pytestmark = needs_compiler

E2M1_HALVES = CodeLayout("u4", group_len=16, scale="float32", values=MXFP4_VALUES)
FRACTIONS = CodeLayout("u4", group_len=64, scale="float32", values=tuple((place - 7) / 9 for place in range(16)))
LAYOUTS = {kind.name: entry.layout for kind, entry in CODED_TYPES.items()} | {
    "4 bits, groups of 128": CodeLayout("u4", group_len=128, scale="float32", has_minimum=True),
    "4 bits, symmetric groups of 64": CodeLayout("u4", zero=8, group_len=64, scale="float32"),
    "8 bits, a scale per output": CodeLayout("u8", zero=128, group_len=512, scale="float32"),
    "8 bits, groups of 64 with minima": CodeLayout("u8", group_len=64, scale="float32", has_minimum=True),
    "table, groups of 16": E2M1_HALVES,
    "6 bits, groups of 16 with minima": CodeLayout("u6", group_len=16, scale="float32", has_minimum=True),
    "fractions": FRACTIONS,
    "e4m3 in blocks": CodeLayout("float8_e4m3fn", group_len=128, scale="float32"),
    "e5m2 per output": CodeLayout("float8_e5m2", group_len=512, scale="float32"),
    "bfloat16": CodeLayout("bfloat16", group_len=None),
    "float16": CodeLayout("float16", group_len=None),
    "float32": CodeLayout("float32", group_len=None),
}
LONG = 512
"""Inputs that every layout takes."""


def is_rounded(layout: CodeLayout) -> bool:
    """Whether products round inputs, unless they are told not to."""
    return layout.code.startswith("u") and layout != FRACTIONS


def rounded_inputs(x: torch.Tensor) -> torch.Tensor:
    """What a product with quantized activations takes in place of x [rows, inputs], float64."""
    blocks = x.float().view(len(x), -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.div(torch.full_like(largest, 127), largest)  # 127 / largest would be rounded twice
    integers = (blocks.double() * inverse.nan_to_num(0, 0).double()).round()
    return (integers * (largest / 127).double()).view(x.shape)


def packed(codes: Codes, dtype: torch.dtype = torch.float32, exact: bool = False) -> Packed:
    rows, inputs = codes.codes.shape
    return Packed(matrix_spec(inputs, rows, dtype, exact_activations=exact), {"all": stored_codes(codes)})


def assert_is_product(got: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Up to the rounding of float32 sums, and of the result to its dtype."""
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ weight.double().abs().T + 1
    eps = 2**-8 if got.dtype == torch.bfloat16 else 2**-22
    assert ((got - expected).abs() <= eps * expected.abs() + 4e-6 * magnitude).all()


@torch.inference_mode()
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_product_is_that_of_the_dequantized_weights(name: str, dtype: torch.dtype, exact: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    codes = random_codes(LAYOUTS[name], 77, LONG, generator)
    matrix, weight = packed(codes, dtype, exact), codes.dequantized()
    for rows in (1, 2, 3, 4, 5, 6, 7, 13, 40):
        x = torch.randn(rows, LONG, generator=generator).to(dtype)
        bias = torch.randn(77, generator=generator).to(dtype) if rows % 2 else None
        taken = x if exact or not is_rounded(codes.layout) else rounded_inputs(x)
        assert_is_product(matrix.multiply(x, bias), taken, weight, bias)


@torch.inference_mode()
@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYOUTS)),
    outputs=st.integers(1, 70),
    rows=st.integers(1, 20),
    supers=st.integers(1, 3),
    exact=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_has_the_right_product(
    name: str, outputs: int, rows: int, supers: int, exact: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout, inputs = LAYOUTS[name], LONG * supers
    codes = random_codes(layout, outputs, inputs, generator)
    x = torch.randn(rows, inputs, generator=generator) * 10 ** torch.randint(-3, 4, (1,), generator=generator)
    taken = x if exact or not is_rounded(layout) else rounded_inputs(x)
    assert_is_product(packed(codes, exact=exact).multiply(x), taken, codes.dequantized(), None)


@torch.inference_mode()
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_the_threads(name: str, exact: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    matrix = packed(random_codes(LAYOUTS[name], 100, LONG, generator), exact=exact)
    x = torch.randn(29, LONG, generator=generator)
    together, before = matrix.multiply(x), torch.get_num_threads()
    for rows in (1, 2, 6, 7, 28):
        assert torch.equal(matrix.multiply(x[:rows]), together[:rows])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            assert torch.equal(matrix.multiply(x), together)
        finally:
            torch.set_num_threads(before)


@torch.inference_mode()
def test_parts_keep_their_own_codes_and_input_orders() -> None:
    generator = torch.Generator().manual_seed(5)
    kinds = {"q": "Q4_K", "k": "4 bits, groups of 128", "v": "Q6_K", "w": "bfloat16"}
    parts = {part: random_codes(LAYOUTS[name], 20, LONG, generator) for part, name in kinds.items()}
    parts["k"] = replace(parts["k"], input_order=torch.randperm(LONG, generator=generator))
    spec = matrix_spec(LONG, dict.fromkeys(parts, 20), torch.float32, exact_activations=True)
    matrix = Packed(spec, {part: stored_codes(codes) for part, codes in parts.items()})
    x, bias = torch.randn(3, LONG, generator=generator), torch.randn(80, generator=generator)
    weight = torch.cat([codes.dequantized() for codes in parts.values()])
    assert_is_product(matrix.multiply(x, bias), x, weight, bias)
    assert matrix.describe() == "u4+u6+bfloat16 (exact)"


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_that_are_looked_up_are_the_weights(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(9)
    codes = random_codes(LAYOUTS[name], 37, LONG, generator)
    ids = torch.tensor([36, 0, 16, 16, 15, 5])
    expected = codes.dequantized()[ids].to(dtype)
    torch.testing.assert_close(
        packed(codes, dtype).rows(ids), expected, rtol=1.6e-2 if dtype != torch.float32 else 2e-6, atol=2e-6
    )


@torch.inference_mode()
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_comes_through_in_its_row(value: float, exact: bool) -> None:
    """A rounded block with infinity is NaN: there is no scale for it."""
    generator = torch.Generator().manual_seed(2)
    for name, layout in LAYOUTS.items():
        matrix, x = packed(random_codes(layout, 17, LONG, generator), exact=exact), torch.ones(3, LONG)
        x[1, 40] = value
        y = matrix.multiply(x)
        assert y[[0, 2]].isfinite().all(), name
        assert not y[1].isfinite().all(), name


@torch.inference_mode()
@pytest.mark.parametrize("scale", [0.0, 1e-38, 1e-30, 1e30, 3e38])
def test_inputs_of_any_size_are_rounded_within_their_block(scale: float) -> None:
    codes = random_codes(LAYOUTS["Q8_0"], 16, 64, torch.Generator().manual_seed(1))
    codes = replace(codes, scales=(codes.scales * 1e-2).half().float())  # type: ignore[operator]
    x = torch.full((1, 64), scale)
    y = packed(codes).multiply(x)
    assert_is_product(y / max(scale, 1e-30), x / max(scale, 1e-30), codes.dequantized(), None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_is_that_of_the_codes(name: str) -> None:
    """Q4_K's scales of 6 bits take 8."""
    layout = LAYOUTS[name]
    matrix = packed(random_codes(layout, 64, LONG, torch.Generator()))
    expected = 64 * LONG * layout.bits / 8
    number = {"float16": 2, "float32": 4, "sub": 2}[layout.scale] * (2 if layout.has_minimum else 1)
    if layout.group_len is not None:
        expected += 64 * LONG / (256 if layout.scale == "sub" else layout.group_len) * number
    if layout.scale == "sub":
        expected += 64 * LONG / layout.group_len * (2 if layout.has_minimum else 1)
    assert matrix.num_bytes == expected


def test_codes_that_are_no_numbers_are_refused() -> None:
    codes = random_codes(LAYOUTS["e4m3 in blocks"], 4, LONG, torch.Generator())
    codes.codes.view(torch.uint8)[3, 7] = 0xFF
    with pytest.raises(CheckpointError, match="holds NaN"):
        packed(codes)


def test_what_no_kernel_takes_is_named() -> None:
    def reasons(inputs: int, stored: StoredTensor, **changes: object) -> str:
        spec = matrix_spec(inputs, stored.shape[0], torch.float32)
        spec = replace(spec, options=replace(spec.options, **changes))
        return "; ".join(Packed.reasons_against(spec, {"all": stored}))

    fine = stored_codes(random_codes(LAYOUTS["Q4_0"], 4, 64, torch.Generator()))
    assert reasons(64, fine) == ""
    assert "the device is meta" in reasons(64, fine, device=torch.device("meta"))
    assert "not float16" in reasons(64, fine, dtype=torch.float16)
    (odd,) = plain(all=torch.randn(4, 40)).values()
    assert "40 inputs" in reasons(40, odd)
    assert "no kernel for float64" in reasons(64, StoredTensor.plain(torch.randn(4, 64).double()))
    undecoded = StoredTensor("IQ2_XXS", (4, 64), torch.zeros(4, 8, dtype=torch.uint8), lambda rows: rows.float())
    assert "IQ2_XXS has no kernel" in reasons(64, undecoded)
    for layout, reason in (
        (CodeLayout("float8_e4m3fn", group_len=None), "float8_e4m3fn without scales"),
        (CodeLayout("u8", group_len=None), "u8 without scales"),
        (CodeLayout("bfloat16", group_len=32, scale="float32"), "bfloat16 with scales"),
    ):
        assert reason in reasons(64, stored_codes(random_codes(layout, 4, 64, torch.Generator())))
    groups = CodeLayout("u4", group_len=16, scale="float32")
    assert "groups of 16" in reasons(64, stored_codes(random_codes(groups, 4, 64, torch.Generator())))
