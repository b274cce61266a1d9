"""Every format against the product in float64, and against its twin, dense."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from cascade_llm.errors import ConfigError
from cascade_llm.weights import select
from cascade_llm.weights.dense import Dense
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat
from cascade_llm.weights.int4 import MAX_ROWS
from cascade_llm.weights.linear import Embedding, Linear
from cascade_llm.weights.onednn import OneDNN
from cascade_llm.weights.select import FORMATS, Entry, allocate_matrix, select_format
from tests.weights.matrices import PLAIN, filled, matrix_in, matrix_spec

SHAPES = [(576, 960), (1536, 576), (64, 128), (48, 100), (7, 3), (64, 1)]


def tolerance(dtype: torch.dtype) -> float:
    return 1e-5 if dtype == torch.float32 else 2e-2


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("name", PLAIN)
def test_a_packed_matrix_has_the_product_of_its_values(
    name: str, inputs: int, outputs: int, dtype: torch.dtype, bias: bool
) -> None:
    torch.manual_seed(0)
    spec = matrix_spec(inputs, outputs, dtype)
    if FORMATS[name].format.reasons_against(spec):
        pytest.skip("not for this matrix")
    values = torch.randn(outputs, inputs).mul_(inputs**-0.5).to(dtype)
    b = torch.randn(outputs).to(dtype) if bias else None
    matrix = filled(matrix_in(spec, name), values)
    for rows in (1, 2, 17, 130):
        x = torch.randn(rows, inputs).to(dtype)
        expected = F.linear(x.double(), values.double(), None if b is None else b.double())
        got = matrix.multiply(x, b)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance(dtype), atol=tolerance(dtype))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_before_it_is_packed_a_matrix_multiplies_too_and_packing_may_be_repeated(name: str, dtype: torch.dtype) -> None:
    spec = matrix_spec(64, 128, dtype)
    if FORMATS[name].format.reasons_against(spec):
        pytest.skip("not for this matrix")
    matrix, x = matrix_in(spec, name), torch.randn(3, 64).to(dtype)
    matrix.load("all", StoredTensor.plain(torch.randn(128, 64)))
    expected = matrix.multiply(x)
    for _ in range(2):
        matrix.pack()
        torch.testing.assert_close(matrix.multiply(x), expected, rtol=tolerance(dtype), atol=20 * tolerance(dtype))


@torch.inference_mode()
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_parts_loaded_in_any_order_give_the_same_matrix(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    parts = {"q": 128, "k": 64, "v": 64}
    quantization = name if FORMATS[name].changes_values else None
    spec = matrix_spec(96, parts, torch.bfloat16, quantization=quantization, stored_dtype=torch.float32)
    if FORMATS[name].format.reasons_against(spec):
        pytest.skip("not for this matrix")
    tensors = {part: torch.randn(rows, 96) for part, rows in parts.items()}
    matrix, other_order = matrix_in(spec, name), matrix_in(spec, name)
    for part, values in tensors.items():
        matrix.load(part, StoredTensor.plain(values))
    for part in random.Random(seed).sample(sorted(parts), len(parts)):
        other_order.load(part, StoredTensor.plain(tensors[part]))
    whole = replace(spec, parts={"all": 256})
    at_once = filled(matrix_in(whole, name), torch.cat(list(tensors.values())))
    matrix.pack()
    other_order.pack()
    for rows in (1, 9):
        x = torch.randn(rows, 96).bfloat16()
        assert torch.equal(matrix.multiply(x), at_once.multiply(x))
        assert torch.equal(other_order.multiply(x), at_once.multiply(x))


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", FORMATS)
def test_a_product_is_written_into_memory_that_is_there(name: str, rows: int, packed: bool, bias: bool) -> None:
    torch.manual_seed(1)
    quantization = name if FORMATS[name].changes_values else None
    spec = matrix_spec(64, 128, torch.bfloat16, quantization=quantization)
    if FORMATS[name].format.reasons_against(spec):
        pytest.skip("not for this matrix")
    matrix = matrix_in(spec, name)
    matrix.load("all", StoredTensor.plain(torch.randn(128, 64)))
    if packed:
        matrix.pack()
    x, b = torch.randn(rows, 64).bfloat16(), torch.randn(128).bfloat16() if bias else None
    for memory in (torch.full((7, 128), torch.nan).bfloat16(), torch.full((7, 130), torch.nan).bfloat16()[:, 1:129]):
        out = memory[:rows]
        assert matrix.multiply(x, b, out).data_ptr() == out.data_ptr()
        torch.testing.assert_close(out, matrix.multiply(x, b), rtol=1e-2, atol=1e-2)
        assert memory[rows:].isnan().all()


@torch.inference_mode()
@pytest.mark.parametrize("name", FORMATS)
def test_an_input_that_is_a_view_gives_the_same_product(name: str) -> None:
    quantization = name if FORMATS[name].changes_values else None
    spec = matrix_spec(64, 64, torch.bfloat16, quantization=quantization)
    if FORMATS[name].format.reasons_against(spec):
        pytest.skip("not for this matrix")
    matrix = filled(matrix_in(spec, name), torch.randn(64, 64))
    for rows in (3, 6):
        wide = torch.randn(rows, 128).bfloat16()
        expected = matrix.multiply(wide[:, 32:96].contiguous())
        torch.testing.assert_close(matrix.multiply(wide[:, 32:96]), expected, rtol=2e-2, atol=2e-2)


def test_a_format_is_chosen_from_dtype_device_and_shape_and_says_why_not_another() -> None:
    spec = matrix_spec(64, 128, torch.float16)
    choice = select_format(spec)
    assert choice.name == "dense"
    assert [name for name, _ in choice.refused] == ["blocked", "onednn"]
    assert "not onednn: oneDNN packs float32 and bfloat16, not float16" in choice.describe()
    for change, reason in (
        ({"device": torch.device("meta")}, "the device is meta"),
        ({"on_stream": True}, "queued on a stream"),
    ):
        elsewhere = replace(spec, options=replace(spec.options, **change))
        assert select_format(elsewhere).name == "dense"
        assert reason in select_format(elsewhere).describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_that_the_kernel_cannot_take_goes_to_onednn(dtype: torch.dtype) -> None:
    if OneDNN.reasons_against(matrix_spec(64, 64, dtype)):
        pytest.skip("oneDNN does not serve here")
    choice = select_format(matrix_spec(64, 100, dtype))
    assert choice.name == "onednn"
    part = "not float32" if dtype == torch.float32 else "matrix is 100 x 64"
    assert part in choice.describe()


def test_a_quantization_that_cannot_hold_a_matrix_is_refused_with_a_cure() -> None:
    with pytest.raises(ConfigError, match=r"int4.*matrix has 40 inputs.*leave it out"):
        allocate_matrix(matrix_spec(40, 64, torch.bfloat16, quantization="int4"))


def test_a_packed_matrix_drops_its_dense_values_unless_they_are_a_tied_embedding_s() -> None:
    spec = matrix_spec(64, 128, torch.float32)
    if OneDNN.reasons_against(spec):
        pytest.skip("oneDNN does not serve here")
    embedding = Embedding(spec)
    embedding.load(StoredTensor.plain(torch.randn(128, 64)))
    values = embedding.matrix.values.clone()
    head = Linear(spec, tied_to=embedding)
    head.pack()
    x = torch.randn(2, 64)
    torch.testing.assert_close(head(x), x @ values.T, rtol=1e-5, atol=1e-5)
    assert torch.equal(embedding(torch.tensor([5, 0, 127])), values[[5, 0, 127]])


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_layer_gives_few_rows_and_many_the_same_product(bias: bool) -> None:
    torch.manual_seed(0)
    spec = matrix_spec(64, 48, torch.bfloat16, quantization="int4", stored_dtype=torch.float32)
    linear, weight = Linear(spec, bias=bias), torch.randn(48, 64).mul_(0.1)
    linear.load("all", StoredTensor.plain(weight))
    if bias:
        linear.load_bias("all", StoredTensor.plain(torch.randn(48)))
    linear.pack()
    rounded = linear.matrix.multiply(torch.eye(64).bfloat16()).T.float()
    assert not torch.equal(rounded, weight)
    torch.testing.assert_close(rounded, weight, rtol=0, atol=0.04)
    x = torch.randn(MAX_ROWS + 1, 64).bfloat16()
    torch.testing.assert_close(linear(x[:-1]), linear(x)[:-1], rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(linear(x[:1]), linear(x)[:1], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_the_values(name: str) -> None:
    quantization = name if FORMATS[name].changes_values else None
    spec = matrix_spec(128, 64, torch.bfloat16, quantization=quantization)
    if FORMATS[name].format.reasons_against(spec):
        pytest.skip("not for this matrix")
    five_bits = 64 * 128 * 5 // 8 if quantization else 0
    assert filled(matrix_in(spec, name), torch.randn(64, 128)).num_bytes == 64 * 128 * 2 + five_bits


def test_a_stored_tensor_is_decoded_when_it_is_loaded() -> None:
    spec = matrix_spec(4, {"a": 1, "b": 2}, torch.float32)
    matrix = Dense(spec)
    codes = torch.tensor([[3], [5]], dtype=torch.uint8)
    matrix.load("b", StoredTensor("codes", (2, 4), codes, lambda data: data.float().expand(2, 4)))
    matrix.load("a", StoredTensor.plain(torch.ones(1, 4)))
    assert torch.equal(matrix.values, torch.tensor([[1.0], [3.0], [5.0]]).expand(3, 4))


class KeptAsStored(WeightFormat):
    """What a format of stored blocks will be: parts keep the bytes that they came in, each in its own format."""

    name = "stored"

    def __init__(self, spec: MatrixSpec) -> None:
        self.spec = spec
        self.parts: dict[str, StoredTensor] = {}

    @staticmethod
    def reasons_against(spec: MatrixSpec) -> list[str]:
        return []

    def load(self, part: str, stored: StoredTensor) -> None:
        self.parts[part] = stored

    def pack(self) -> None:
        pass

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


def test_a_new_format_is_a_class_and_a_line_and_may_hold_parts_of_several_formats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry = Entry(KeptAsStored, lambda spec, _: KeptAsStored(spec))
    monkeypatch.setattr(select, "FORMATS", {"stored": entry, **FORMATS})
    linear = Linear(matrix_spec(4, {"q": 2, "v": 1}, torch.float32))
    codes = torch.tensor([[3], [5]], dtype=torch.uint8)
    linear.load("v", StoredTensor.plain(torch.full((1, 4), 7.0)))
    linear.load("q", StoredTensor("codes", (2, 4), codes, lambda data: data.float().expand(2, 4)))
    linear.pack()
    x = torch.randn(3, 4)
    torch.testing.assert_close(linear(x), x @ torch.tensor([[3.0], [5.0], [7.0]]).expand(3, 4).T)
    assert linear.matrix.num_bytes == 2 + 4 * 4
