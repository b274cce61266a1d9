from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cascade_llm.device.cpu_levels import LEVEL_VARIABLE, levels_to_try, processor_flags
from cascade_llm.device.native_units import BLOCKED
from cascade_llm.weights import blocked as module
from cascade_llm.weights.blocked import Blocked, is_blocked
from tests.native_code import needs_compiler
from tests.weights.matrices import matrix_spec

pytestmark = [
    needs_compiler,
    pytest.mark.skipif("avx512_bf16" not in processor_flags(), reason="the kernel is for processors with AVX512-BF16"),
]


def blocked(weight: torch.Tensor) -> Blocked:
    matrix = Blocked(weight)
    assert matrix.serves(1)
    return matrix


@torch.inference_mode()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [*range(1, 20), 24, 25, 47, 64, 130])
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 960), (1536, 576), (64, 64), (96, 192)])
def test_the_kernel_equals_the_product_in_float64(inputs: int, outputs: int, rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    weight, x = torch.randn(outputs, inputs).bfloat16(), torch.randn(rows, inputs).bfloat16()
    b = torch.randn(outputs).bfloat16() if bias else None
    matrix = blocked(weight)
    expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
    magnitude = x.double().abs() @ weight.double().abs().T + 4
    assert ((matrix.multiply(x, b) - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * magnitude).all()


@torch.inference_mode()
@pytest.mark.parametrize("level", [level.name for level in levels_to_try() if BLOCKED.fits(level)])
def test_the_kernel_of_every_level_equals_the_product_in_float64(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles and parts of them, in the layout that oneDNN has here."""
    monkeypatch.setenv(LEVEL_VARIABLE, level)
    module._compiled.cache_clear()
    try:
        for outputs, inputs in ((192, 96), (576, 160), (64, 64)):
            for rows in (1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 47, 49, 70):
                test_the_kernel_equals_the_product_in_float64(inputs, outputs, rows, rows % 2 == 1)
    finally:
        module._compiled.cache_clear()


@torch.inference_mode()
@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("num_rows", [3, 13])
def test_any_number_of_threads_gives_the_same(num_rows: int, num_threads: int) -> None:
    weight, x = torch.randn(320, 96).bfloat16(), torch.randn(num_rows, 96).bfloat16()
    matrix = blocked(weight)
    expected, before = matrix.multiply(x), torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(matrix.multiply(x), expected)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_nan_comes_through() -> None:
    for rows in (2, 20, 40):
        weight, x = torch.randn(64, 64).bfloat16(), torch.randn(rows, 64).bfloat16()
        x[1, 7] = torch.nan
        x[-1, 9] = torch.inf if rows > 2 else torch.nan
        y = blocked(weight).multiply(x)
        assert y[: -rows + 1].isfinite().all()
        assert y[1].isnan().all()
        assert y[2:-1].isfinite().all()
        assert not y[-1].isfinite().any()


@pytest.mark.parametrize(
    ("outputs", "inputs", "dtype"), [(48, 64, torch.bfloat16), (192, 102, torch.bfloat16), (64, 64, torch.float32)]
)
def test_a_weight_that_is_packed_otherwise_is_left_to_onednn(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    (reason,) = Blocked.reasons_against(matrix_spec(inputs, outputs, dtype))
    assert ("not float32" if dtype == torch.float32 else f"matrix is {outputs} x {inputs}") in reason


def test_memory_that_does_not_hold_the_weight_is_noticed() -> None:
    weight = torch.randn(128, 64).bfloat16()
    other = weight.clone()
    other[77, 3] += 1
    address = torch.ops.mkldnn.data_ptr(packed := torch.ops.mkldnn._reorder_linear_weight(weight))
    (block_len,) = [length for length in (64, 32) if is_blocked(address, weight, length)]
    assert not is_blocked(address, other, block_len)
    del packed


@torch.inference_mode()
def test_a_layout_that_the_kernel_does_not_know_is_left_to_onednn() -> None:
    """oneDNN pads 100 inputs."""
    weight, x = torch.randn(192, 100).bfloat16(), torch.randn(3, 100).bfloat16()
    spec = matrix_spec(100, 192, torch.bfloat16)
    assert Blocked.reasons_against(spec) == []
    matrix = Blocked(weight)
    assert not matrix.serves(3)
    torch.testing.assert_close(matrix.multiply(x), F.linear(x, weight), rtol=2e-2, atol=2e-1)


@torch.inference_mode()
def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    """Beyond four rows, which have two sums each in place of one."""
    weight, x = torch.randn(192, 576).bfloat16(), torch.randn(40, 576).bfloat16()
    matrix = blocked(weight)
    together = matrix.multiply(x)
    for rows in (5, 6, 7, 12, 13, 39):
        assert torch.equal(matrix.multiply(x[:rows]), together[:rows])


def test_long_inputs_of_many_rows_are_left_to_onednn() -> None:
    short, longest = (blocked(torch.randn(64, inputs).bfloat16()) for inputs in (2048, 4160))
    assert [short.serves(rows) for rows in (0, 1, 64, 65, 5000)] == [False, True, True, True, True]
    assert [longest.serves(rows) for rows in (0, 1, 64, 65, 5000)] == [False, True, True, False, False]
