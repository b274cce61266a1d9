"""Every format against the product in float64, and the choice between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cascade_llm.weights import select
from cascade_llm.weights.dense import Dense, dense_values
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat
from cascade_llm.weights.linear import Embedding, Linear
from cascade_llm.weights.onednn import OneDNN
from cascade_llm.weights.packed import Packed
from cascade_llm.weights.select import FORMATS, Entry, build_matrix, describe_weights, select_format
from cascade_llm.weights.stack import OneByOne
from tests.native_code import expect_native
from tests.weights.matrices import matrix_in, matrix_spec, plain, random_codes, stored_codes
from tests.weights.test_packed import LAYOUTS

OF_PLAIN_VALUES = [name for name in FORMATS if not name.startswith("cuda_")]
"""The others hold codes on a GPU: `test_cuda_formats`."""
SHAPES = [(576, 960), (1536, 576), (64, 128), (48, 100), (7, 3), (64, 1)]


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 2e-2


def skip_unless_it_holds(name: str, spec: MatrixSpec) -> None:
    parts = plain(**{part: torch.zeros(rows, spec.in_features) for part, rows in spec.parts.items()})
    holds = Packed.reasons_against if name == "packed" else FORMATS[name].reasons_against
    if holds(spec, parts):
        pytest.skip("not for this matrix")


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("name", OF_PLAIN_VALUES)
def test_a_matrix_has_the_product_of_its_values(
    name: str, inputs: int, outputs: int, dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    spec = matrix_spec(inputs, outputs, dtype)
    skip_unless_it_holds(name, spec)
    values = torch.randn(outputs, inputs).mul_(inputs**-0.5).to(dtype)
    b = torch.randn(outputs).to(dtype) if bias else None
    matrix = matrix_in(spec, name, values)
    for rows in (1, 2, 17, 130):
        x = torch.randn(rows, inputs).to(dtype)
        expected = F.linear(x.double(), values.double(), None if b is None else b.double())
        got = matrix.multiply(x, b)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype))


@torch.inference_mode()
@pytest.mark.parametrize("order", [("q", "k", "v"), ("v", "q", "k")])
@pytest.mark.parametrize("name", OF_PLAIN_VALUES)
def test_parts_loaded_in_any_order_give_the_same_matrix(name: str, order: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    parts = {"q": 128, "k": 64, "v": 64}
    spec = matrix_spec(96, parts, torch.bfloat16)
    skip_unless_it_holds(name, spec)
    tensors = {part: torch.randn(parts[part], 96) for part in order}
    matrix = FORMATS[name].build(spec, plain(**tensors))
    whole = replace(spec, parts={"all": 256})
    at_once = matrix_in(whole, name, torch.cat([tensors[part] for part in parts]))
    for rows in (1, 9):
        x = torch.randn(rows, 96).bfloat16()
        assert torch.equal(matrix.multiply(x), at_once.multiply(x))


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", OF_PLAIN_VALUES)
def test_a_product_is_written_into_memory_that_is_there(name: str, rows: int, bias: bool) -> None:
    torch.manual_seed(1)
    spec = matrix_spec(64, 128, torch.bfloat16)
    skip_unless_it_holds(name, spec)
    matrix = matrix_in(spec, name, torch.randn(128, 64))
    x, b = torch.randn(rows, 64).bfloat16(), torch.randn(128).bfloat16() if bias else None
    for memory in (torch.full((7, 128), torch.nan).bfloat16(), torch.full((7, 130), torch.nan).bfloat16()[:, 1:129]):
        out = memory[:rows]
        assert matrix.multiply(x, b, out).data_ptr() == out.data_ptr()
        torch.testing.assert_close(out, matrix.multiply(x, b), rtol=1e-2, atol=1e-2)
        assert memory[rows:].isnan().all()


@torch.inference_mode()
@pytest.mark.parametrize("name", OF_PLAIN_VALUES)
def test_an_input_that_is_a_view_gives_the_same_product(name: str) -> None:
    spec = matrix_spec(64, 64, torch.bfloat16)
    skip_unless_it_holds(name, spec)
    matrix = matrix_in(spec, name, torch.randn(64, 64))
    for rows in (3, 6):
        wide = torch.randn(rows, 128).bfloat16()
        expected = matrix.multiply(wide[:, 32:96].contiguous())
        torch.testing.assert_close(matrix.multiply(wide[:, 32:96]), expected, rtol=2e-2, atol=2e-2)


def test_a_format_is_chosen_from_dtype_device_and_storage_and_says_why_not_another() -> None:
    spec, parts = matrix_spec(64, 128, torch.float16), plain(all=torch.zeros(128, 64))
    choice = select_format(spec, parts)
    assert choice.name == "dense"
    assert [name for name, _ in choice.refused] == ["packed", "cuda_int4", "cuda_fp8", "blocked", "onednn"]
    assert "not blocked nor onednn: oneDNN packs float32 and bfloat16, not float16" in choice.describe()
    for change, reason in (
        ({"device": torch.device("meta")}, "the device is meta"),
        ({"on_stream": True}, "queued on a stream"),
    ):
        elsewhere = replace(spec, options=replace(spec.options, **change))
        assert select_format(elsewhere, parts).name == "dense"
        assert reason in select_format(elsewhere, parts).describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_stay_as_they_are_stored(dtype: torch.dtype) -> None:
    stored = stored_codes(random_codes(LAYOUTS["Q4_1"], 16, 64, torch.Generator()))
    spec = matrix_spec(64, 16, dtype)
    expect_native(*Packed.reasons_against(spec, {"all": stored}))
    assert select_format(spec, {"all": stored}).name == "packed"


def test_plain_bfloat16_is_left_to_formats_that_multiply_it() -> None:
    spec = matrix_spec(64, 128, torch.bfloat16)
    assert select_format(spec, plain(all=torch.zeros(128, 64))).name != "packed"


def test_a_head_that_is_tied_multiplies_with_the_embedding_s_values() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        spec = matrix_spec(64, 128, dtype)
        embedding, head = Embedding(spec), None
        values = torch.randn(128, 64).to(dtype)
        embedding.load(StoredTensor.plain(values))
        head = Linear(spec, tied_to=embedding)
        head.tie()
        x = torch.randn(2, 64).to(dtype)
        torch.testing.assert_close(head(x), x @ values.T, rtol=tolerance(dtype), atol=10 * tolerance(dtype))
        assert torch.equal(embedding(torch.tensor([5, 0, 127])), values[[5, 0, 127]])


@torch.inference_mode()
def test_a_quantized_embedding_is_the_head_too_and_stands_once() -> None:
    codes = random_codes(LAYOUTS["Q8_0"], 40, 64, torch.Generator().manual_seed(4))
    spec = matrix_spec(64, 40, torch.float32, exact_activations=True)
    stored = stored_codes(codes)
    expect_native(*Packed.reasons_against(spec, {"all": stored}))
    embedding = Embedding(spec)
    embedding.load(stored)
    head = Linear(spec, tied_to=embedding)
    head.tie()
    assert head.matrix is embedding.matrix
    weight, x = codes.dequantized(), torch.randn(3, 64)
    torch.testing.assert_close(embedding(torch.tensor([39, 7])), weight[[39, 7]], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(head(x), x @ weight.T, rtol=1e-4, atol=1e-3)


@torch.inference_mode()
def test_a_matrix_that_is_rounded_while_loading_is_close_to_its_values() -> None:
    torch.manual_seed(0)
    spec = matrix_spec(64, {"a": 48, "b": 16}, torch.float32, quantization="int4", exact_activations=True)
    linear, weight = Linear(spec), torch.randn(64, 64).mul_(0.1)
    linear.load("b", StoredTensor.plain(weight[48:]))
    linear.load("a", StoredTensor.plain(weight[:48]))
    rounded = linear(torch.eye(64)).T
    assert not torch.equal(rounded, weight)
    torch.testing.assert_close(rounded, weight, rtol=0, atol=0.04)


@pytest.mark.parametrize("name", [name for name in OF_PLAIN_VALUES if name != "packed"])
def test_bytes_are_those_of_the_values(name: str) -> None:
    spec = matrix_spec(128, 64, torch.bfloat16)
    skip_unless_it_holds(name, spec)
    assert matrix_in(spec, name, torch.randn(64, 128)).num_bytes == 64 * 128 * 2


def test_a_stored_tensor_is_decoded_when_it_is_loaded() -> None:
    spec = matrix_spec(4, {"a": 1, "b": 2}, torch.float32)
    codes = torch.tensor([[3], [5]], dtype=torch.uint8)
    stored = StoredTensor("codes", (2, 4), codes, lambda data: data.float().expand(2, 4))
    values = dense_values(spec, {"b": stored, **plain(a=torch.ones(1, 4))})
    assert torch.equal(values, torch.tensor([[1.0], [3.0], [5.0]]).expand(3, 4))


def test_a_layer_without_all_its_parts_has_no_matrix() -> None:
    linear = Linear(matrix_spec(4, {"q": 2, "v": 1}, torch.float32))
    linear.load("v", StoredTensor.plain(torch.ones(1, 4)))
    with pytest.raises(AssertionError, match="has no values"):
        _ = linear.matrix


class KeptAsStored(WeightFormat):
    """Parts keep the bytes that they came in, each in its own format."""

    name = "stored"

    def __init__(self, spec: MatrixSpec, parts: select.Parts) -> None:
        self.spec, self.parts = spec, parts

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out = x.new_empty(len(x), self.spec.out_features) if out is None else out
        for part, stored in self.parts.items():
            rows = self.spec.rows_of(part)
            torch.matmul(x, stored.values().to(x.dtype).T, out=out[:, rows])
        return out if bias is None else out.add_(bias)

    @property
    def num_bytes(self) -> int:
        return sum(stored.data.nbytes for stored in self.parts.values())


def test_a_new_format_is_a_class_and_a_line_and_may_hold_parts_of_several_kinds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = Entry(lambda spec, parts: [], KeptAsStored)
    monkeypatch.setattr(select, "FORMATS", {"stored": entry, **FORMATS})
    linear = Linear(matrix_spec(4, {"q": 2, "v": 1}, torch.float32))
    codes = torch.tensor([[3], [5]], dtype=torch.uint8)
    linear.load("v", StoredTensor.plain(torch.full((1, 4), 7.0)))
    linear.load("q", StoredTensor("codes", (2, 4), codes, lambda data: data.float().expand(2, 4)))
    x = torch.randn(3, 4)
    torch.testing.assert_close(linear(x), x @ torch.tensor([[3.0], [5.0], [7.0]]).expand(3, 4).T)
    assert linear.matrix.num_bytes == 2 + 4 * 4


def test_the_log_says_how_many_matrices_are_in_which_format() -> None:
    dense = build_matrix(matrix_spec(4, 3, torch.float64), plain(all=torch.ones(3, 4).double()))
    assert isinstance(dense, Dense)
    assert describe_weights([dense, dense]).startswith("weights: 2 dense (")
    assert describe_weights([Dense(torch.ones(3, 4))]) == "weights: 1 dense"


def test_the_log_says_why_no_preferred_format_holds_a_matrix() -> None:
    spec = matrix_spec(64, 128, torch.float16)
    matrix = build_matrix(spec, plain(all=torch.zeros(128, 64)))
    told = describe_weights([matrix, matrix])
    assert told.startswith("weights: 2 dense (not packed: its kernels take float32 and bfloat16, not float16; not ")
    assert "not blocked nor onednn: oneDNN packs float32 and bfloat16, not float16" in told
    assert describe_weights([OneByOne([matrix, matrix], 128)]) == told.replace("2", "1", 1)


def test_onednn_serves_float32_here_where_inputs_are_no_blocks() -> None:
    spec = matrix_spec(40, 64, torch.float32)
    if OneDNN.reasons_against(spec):
        pytest.skip("oneDNN does not serve here")
    assert select_format(spec, plain(all=torch.zeros(64, 40))).name == "onednn"
