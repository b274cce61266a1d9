from __future__ import annotations

import pytest
import torch

from cascade_llm.layers.activation import silu_and_mul
from cascade_llm.layers.rmsnorm import RMSNorm

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 8), (5, 96), (3, 4, 16)])
def test_rmsnorm_equals_its_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-5, dtype=dtype, device=torch.device("cpu"))
    norm.weight.normal_()
    x = torch.randn(shape).mul_(3).to(dtype)
    exact = x.double()
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    got = norm(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_rmsnorm_of_tiny_rows_is_bounded_by_eps() -> None:
    norm = RMSNorm(16, 1e-5, dtype=torch.float32, device=torch.device("cpu"))
    assert norm(torch.zeros(2, 16)).abs().max() == 0
    torch.testing.assert_close(norm(torch.full((1, 16), 1e-6)), torch.full((1, 16), 1e-6 * 1e-5**-0.5))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "size"), [(1, 4), (6, 33), (64, 128)])
def test_silu_and_mul_equals_its_definition(rows: int, size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(rows, 2 * size).mul_(4).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = gate * torch.sigmoid(gate) * up
    got = silu_and_mul(gate_up)
    assert got.is_contiguous()
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=2 * TOLERANCE[dtype], atol=2 * TOLERANCE[dtype])
