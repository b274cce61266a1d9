"""Formats for a GPU, on torch's own CPU twins of their kernels, and on doubles that keep the CUDA kernels' rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from cascade_llm.errors import CheckpointError
from cascade_llm.weights.codes import CodeLayout, Codes
from cascade_llm.weights.cuda_fp8 import CudaFP8
from cascade_llm.weights.cuda_int4 import CudaInt4
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat
from cascade_llm.weights.select import FORMATS, build_matrix, select_format
from tests.doubles.torch_products import cuda_products, packed_words, unpacked_words
from tests.weights.matrices import matrix_spec, plain, random_codes, stored_codes

HOPPER, AMPERE = (9, 0), (8, 0)
INT4 = {
    "Q4_0": CodeLayout("u4", zero=8),
    "Q4_1": CodeLayout("u4", has_minimum=True),
    "Q4_K": CodeLayout("u4", scale="sub", has_minimum=True),
    "2 bits, groups of 64": CodeLayout("u2", group_len=64),
    "GPTQ, groups of 128": CodeLayout("u4", group_len=128, scale="float32", has_minimum=True),
    "a scale per output": CodeLayout("u4", zero=8, group_len=512, scale="float32"),
    "groups of 96": CodeLayout("u4", zero=8, group_len=96),
}
FP8 = {
    "a scale per output": CodeLayout("float8_e4m3fn", group_len=512, scale="float32"),
    "blocks of 128": CodeLayout("float8_e4m3fn", group_len=128, scale="float32"),
    "blocks of 256": CodeLayout("float8_e4m3fn", group_len=256, scale="float32"),
}
OPERATORS = {
    "_convert_weight_to_int4pack": "aten::_convert_weight_to_int4pack(Tensor self, int innerKTiles) -> Tensor",
    "_weight_int4pack_mm": "aten::_weight_int4pack_mm(Tensor self, Tensor mat2, int qGroupSize, "
    "Tensor qScaleAndZeros) -> Tensor",
    "_scaled_mm.out": "aten::_scaled_mm.out(Tensor self, Tensor mat2, Tensor scale_a, Tensor scale_b, "
    "Tensor? bias=None, Tensor? scale_result=None, ScalarType? out_dtype=None, bool use_fast_accum=False, *, "
    "Tensor(a!) out) -> Tensor(a!)",
}
"""As torch 2.13 has them."""


@pytest.fixture(autouse=True)
def products() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode(), cuda_products():
        yield


def on_gpu(spec: MatrixSpec, arch: tuple[int, int] = HOPPER, device: str = "cpu") -> MatrixSpec:
    return replace(spec, options=replace(spec.options, arch=arch, on_stream=True, device=torch.device(device)))


def inputs_of(layout: CodeLayout) -> int:
    return 576 if layout.group_len == 96 else 512


def codes_in(layout: CodeLayout, rows: int = 48, seed: int = 0) -> Codes:
    return random_codes(layout, rows, inputs_of(layout), torch.Generator().manual_seed(seed))


def built(codes: Codes, kind: str = "cuda_int4", **options: object) -> WeightFormat:
    """Through the table, in two parts."""
    rows, inputs = codes.codes.shape
    spec = on_gpu(matrix_spec(inputs, {"a": 16, "b": rows - 16}, torch.bfloat16))
    whole = stored_codes(codes)
    parts = {"a": part_of(whole, slice(0, 16)), "b": part_of(whole, slice(16, rows))}
    spec = replace(spec, options=replace(spec.options, **options))
    assert select_format(spec, parts).name == kind
    return build_matrix(spec, parts)


def part_of(stored: StoredTensor, rows: slice) -> StoredTensor:
    data = stored.data[rows]
    return replace(stored, shape=(len(data), stored.shape[1]), source=data)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_those_that_were_read(name: str) -> None:
    packet, _, overload = name.partition(".")
    assert str(getattr(getattr(torch.ops.aten, packet), overload or "default")._schema) == OPERATORS[name]


@pytest.mark.parametrize("name", INT4)
def test_codes_of_four_bits_multiply_as_what_they_stand_for(name: str) -> None:
    codes = codes_in(INT4[name])
    matrix = built(codes)
    weight, bias = codes.dequantized().double(), torch.randn(48).bfloat16()
    for rows in (1, 16, 33):
        x = torch.randn(rows, weight.shape[1]).bfloat16()
        expected = x.double() @ weight.T + bias.double()
        # a scale is rounded by 2^-9, a weight and a result by as much again
        bound = x.double().abs() @ weight.abs().T / 2**7 + expected.abs() / 2**7 + 0.02
        assert ((matrix.multiply(x, bias).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("name", INT4)
def test_products_are_those_of_torch_s_twin_for_the_cpu(name: str) -> None:
    """torch's own kernel, given the grid that our format made, says what that grid means."""
    codes = codes_in(INT4[name])
    matrix = built(codes)
    assert isinstance(matrix, CudaInt4)
    values = unpacked_words(matrix._words)
    assert torch.equal(values, codes.codes.long())
    x = torch.randn(5, values.shape[1]).bfloat16()
    words = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 2)
    twin = torch.ops.aten._weight_int4pack_mm_for_cpu(x, words, matrix._group_len, matrix._grid)
    torch.testing.assert_close(matrix.multiply(x), twin, rtol=2e-2, atol=2e-2 * float(twin.abs().max()))


def test_codes_in_another_order_take_their_inputs_in_it() -> None:
    codes = codes_in(INT4["GPTQ, groups of 128"])
    order = torch.randperm(512, generator=torch.Generator().manual_seed(3))
    codes = replace(codes, input_order=order)
    x = torch.randn(3, 512).bfloat16()
    expected = x.float() @ codes.dequantized().T
    torch.testing.assert_close(built(codes).multiply(x).float(), expected, rtol=3e-2, atol=0.2)


@pytest.mark.parametrize("name", FP8)
def test_float8_multiplies_inputs_that_are_rounded_to_float8(name: str) -> None:
    codes = codes_in(FP8[name])
    matrix = built(codes, "cuda_fp8")
    assert isinstance(matrix, CudaFP8)
    weight = codes.dequantized().double()
    for rows in (1, 3, 40):
        x = torch.randn(rows, 512).bfloat16()
        x[0] = 0
        groups = x.float().view(rows, -1, matrix._group_len)
        scales = (groups.abs().amax(-1, keepdim=True) / 448).clamp_min(1e-12)
        rounded = ((groups / scales).to(torch.float8_e4m3fn).double() * scales.double()).flatten(1)
        product = matrix.multiply(x, torch.ones(48).bfloat16())
        torch.testing.assert_close(product.double(), rounded @ weight.T + 1, rtol=1e-2, atol=2e-2)
        bound = x.double().abs() @ weight.abs().T / 16 + 0.05  # 2^-4 is half a step of three bits
        assert ((product.double() - 1 - x.double() @ weight.T).abs() <= bound).all()


def test_scales_of_rows_are_what_torch_s_own_product_takes() -> None:
    codes = codes_in(FP8["a scale per output"])
    matrix = built(codes, "cuda_fp8")
    assert isinstance(matrix, CudaFP8)
    x = torch.randn(6, 512).bfloat16()
    rounded, scales = matrix._rounded(x)
    by_torch = torch._scaled_mm(rounded, matrix._codes.t(), scales, matrix._scales, out_dtype=torch.bfloat16)
    torch.testing.assert_close(matrix.multiply(x), by_torch, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", ["cuda_int4", "cuda_fp8"])
def test_an_input_that_is_not_finite_is_seen_in_its_row_alone(kind: str) -> None:
    codes = codes_in(INT4["Q4_0"] if kind == "cuda_int4" else FP8["blocks of 128"])
    x = torch.randn(3, 512).bfloat16()
    x[1, 7], x[2, 9] = torch.nan, torch.inf
    product = built(codes, kind).multiply(x)
    assert product[0].isfinite().all()
    assert not product[1:].isfinite().any()


@pytest.mark.parametrize("kind", ["cuda_int4", "cuda_fp8"])
def test_a_product_is_written_into_memory_that_is_there(kind: str) -> None:
    matrix = built(codes_in(INT4["Q4_0"] if kind == "cuda_int4" else FP8["blocks of 128"]), kind)
    x, bias = torch.randn(5, 512).bfloat16(), torch.randn(48).bfloat16()
    for memory in (torch.zeros(7, 48).bfloat16(), torch.zeros(7, 50).bfloat16()[:, 1:49]):
        out = memory[:5]
        assert matrix.multiply(x, bias, out).data_ptr() == out.data_ptr()
        assert torch.equal(out, matrix.multiply(x, bias))
        assert not memory[5:].any()
    wide = torch.randn(5, 1024).bfloat16()
    assert torch.equal(matrix.multiply(wide[:, 256:768]), matrix.multiply(wide[:, 256:768].contiguous()))
    assert matrix.multiply(x[:0]).shape == (0, 48)


@pytest.mark.parametrize("kind", ["cuda_int4", "cuda_fp8"])
def test_memory_is_that_of_the_codes_and_lies_on_the_device(kind: str) -> None:
    codes = codes_in(INT4["Q4_0"] if kind == "cuda_int4" else FP8["blocks of 128"])
    matrix = built(codes, kind, device=torch.device("meta"))
    bits = 4 + 32 / 32 if kind == "cuda_int4" else 8 + 32 / 128
    assert matrix.num_bytes == 48 * 512 * bits / 8
    assert matrix.multiply(torch.empty(3, 512, dtype=torch.bfloat16, device="meta")).is_meta


def test_a_code_that_is_no_number_is_told() -> None:
    codes = codes_in(FP8["blocks of 128"])
    codes.codes[40, 300] = torch.nan
    with pytest.raises(CheckpointError, match="holds NaN"):
        built(codes, "cuda_fp8")


def test_packed_words_are_in_the_order_of_the_source() -> None:
    """Worked out by hand for lane 5 (output 1, inputs 2 and 3 of eight) of the second pair of tiles."""
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    codes[1, [34, 35, 42, 43, 50, 51, 58, 59]] = torch.arange(8, 16, dtype=torch.uint8)
    words = packed_words(codes[:, ::2] << 4 | codes[:, 1::2], 4)
    assert words.shape == (1, 1, 32, 2)
    (place,) = words.nonzero().tolist()
    assert place == [0, 0, 5, 1]
    assert int(words[0, 0, 5, 1]) & 0xFFFFFFFF == 0xFDB9ECA8
    assert torch.equal(unpacked_words(words), codes.long())


REFUSED = {
    "no GPU": ("cuda_int4", {"arch": None}, {}, "for CUDA"),
    "an old GPU": ("cuda_int4", {"arch": (7, 5)}, {}, "needs compute capability 8.0, the GPU has 7.5"),
    "float16": ("cuda_int4", {"dtype": torch.float16}, {}, "not float16"),
    "five bits": ("cuda_int4", {}, {"layout": CodeLayout("u5", zero=16)}, "4 bits, not u5"),
    "a table": ("cuda_int4", {}, {"layout": CodeLayout("u4", values=tuple(range(16)))}, "values of a table"),
    "groups of 16": ("cuda_int4", {}, {"layout": CodeLayout("u2", group_len=16)}, "not 16"),
    "20 outputs": ("cuda_int4", {}, {"rows": 20}, "multiple of 8 outputs"),
    "Ampere": ("cuda_fp8", {"arch": AMPERE}, {"layout": FP8["blocks of 128"]}, "8.9, the GPU has 8.0"),
    "blocks on Ada": ("cuda_fp8", {"arch": (8, 9)}, {"layout": FP8["blocks of 128"]}, "scales of blocks"),
    "blocks on Blackwell": ("cuda_fp8", {"arch": (10, 0)}, {"layout": FP8["blocks of 128"]}, "scales of blocks"),
    "Blackwell cards": ("cuda_fp8", {"arch": (12, 0)}, {"layout": FP8["a scale per output"]}, "not known to run"),
    "exact inputs": ("cuda_fp8", {"exact_activations": True}, {"layout": FP8["blocks of 128"]}, "exact_activations"),
    "e5m2": ("cuda_fp8", {}, {"layout": CodeLayout("float8_e5m2", group_len=128, scale="float32")}, "not float8_e5m2"),
    "groups of 64": (
        "cuda_fp8",
        {},
        {"layout": CodeLayout("float8_e4m3fn", group_len=64, scale="float32")},
        "a scale for a row or for 128",
    ),
    "40 outputs": ("cuda_fp8", {}, {"layout": FP8["blocks of 128"], "rows": 40}, "multiples of 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernels_do_not_take_is_refused_with_its_reason(case: str) -> None:
    kind, changes, of_codes, reason = REFUSED[case]
    codes = codes_in(of_codes.get("layout", INT4["Q4_0"]), of_codes.get("rows", 48))
    spec = on_gpu(matrix_spec(512, len(codes.codes), torch.bfloat16))
    spec = replace(spec, options=replace(spec.options, **changes))
    (told,) = FORMATS[kind].reasons_against(spec, {"all": stored_codes(codes)})
    assert reason in told


def test_plain_values_and_parts_in_different_orders_are_refused() -> None:
    spec = on_gpu(matrix_spec(512, {"a": 16, "b": 16}, torch.bfloat16))
    values = plain(a=torch.zeros(16, 512), b=torch.zeros(16, 512))
    assert CudaInt4.reasons_against(spec, values) == ["the values are plain"]
    assert select_format(spec, values).name == "dense"
    codes = codes_in(INT4["Q4_0"], 16)
    other = replace(codes, input_order=torch.arange(511, -1, -1))
    parts = {"a": stored_codes(codes), "b": stored_codes(other)}
    assert CudaInt4.reasons_against(spec, parts) == ["its parts take the inputs in different orders"]
    assert select_format(spec, parts).name == "dense"


def test_rows_by_ada_and_an_older_cuda_without_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, blocks = (stored_codes(codes_in(FP8[name])) for name in ("a scale per output", "blocks of 128"))
    spec = on_gpu(matrix_spec(512, 48, torch.bfloat16), (8, 9))
    assert CudaFP8.reasons_against(spec, {"all": rows}) == []
    hopper = on_gpu(spec)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert CudaFP8.reasons_against(hopper, {"all": blocks}) == ["scales of blocks need CUDA 12.9, torch has 12.8"]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert CudaFP8.reasons_against(hopper, {"all": blocks}) == []
