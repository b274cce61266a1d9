from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cascade_llm.weights.int4 import MAX_ROWS
from cascade_llm.weights.linear import Linear, can_pack

CPU = torch.device("cpu")
SHAPES = [(576, 960), (1536, 576), (48, 100), (7, 3), (64, 1)]


def random_linear(inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> Linear:
    linear = Linear(inputs, outputs, bias=bias, dtype=dtype, device=CPU)
    linear.weight.normal_(std=inputs**-0.5)
    if linear.bias is not None:
        linear.bias.normal_()
    return linear


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_packed_equals_dense(inputs: int, outputs: int, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    linear = random_linear(inputs, outputs, dtype, bias)
    weight, tolerance = linear.weight.double(), 1e-5 if dtype == torch.float32 else 2e-2
    linear.pack()
    assert linear.is_packed == can_pack(torch.empty(1, dtype=dtype))
    for rows in (1, 2, 17, 130):
        x = torch.randn(rows, inputs).to(dtype)
        expected = F.linear(x.double(), weight, None if linear.bias is None else linear.bias.double())
        got = linear(x)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def test_packing_frees_the_dense_weight_and_can_be_repeated() -> None:
    linear = random_linear(32, 16, torch.float32, bias=False)
    x = torch.randn(3, 32)
    expected = linear(x)
    linear.pack()
    linear.pack()
    if linear.is_packed:
        assert linear.weight.numel() == 0
    torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_dtype_that_cannot_be_packed_stays_dense(dtype: torch.dtype) -> None:
    linear = random_linear(32, 16, dtype, bias=True)
    linear.pack()
    assert not linear.is_packed
    assert linear(torch.randn(2, 32).to(dtype)).shape == (2, 16)


@torch.inference_mode()
def test_an_input_that_is_a_view_gives_the_same_product() -> None:
    linear = random_linear(64, 32, torch.bfloat16, bias=False)
    wide = torch.randn(5, 128).bfloat16()
    expected = F.linear(wide[:, 32:96].contiguous(), linear.weight)
    linear.pack()
    torch.testing.assert_close(linear(wide[:, 32:96]), expected, rtol=2e-2, atol=2e-2)


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
def test_a_quantized_layer_gives_few_rows_and_many_the_same_product(bias: bool) -> None:
    torch.manual_seed(0)
    linear = Linear(64, 48, bias=bias, dtype=torch.bfloat16, device=CPU, loading_dtype=torch.float32)
    linear.weight.normal_(std=0.1)
    if linear.bias is not None:
        linear.bias.normal_()
    original = linear.weight
    linear.quantize()
    assert linear.weight.dtype == torch.bfloat16
    assert not torch.equal(linear.weight.float(), original)
    torch.testing.assert_close(linear.weight.float(), original, rtol=0, atol=0.04)
    linear.pack()
    x = torch.randn(MAX_ROWS + 1, 64).bfloat16()
    torch.testing.assert_close(linear(x[:-1]), linear(x)[:-1], rtol=3e-2, atol=3e-2)
    torch.testing.assert_close(linear(x[:1]), linear(x)[:1], rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_product_written_into_memory_that_is_there(bias: bool, packed: bool) -> None:
    linear = random_linear(64, 48, torch.float32, bias)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    if packed:
        linear.pack()
    memory = torch.full((7, 48), torch.nan)
    linear.write(x, memory[:5])
    torch.testing.assert_close(memory[:5], linear(x))
    assert memory[5:].isnan().all()
