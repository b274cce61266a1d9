"""Every implementation of the elementwise operations against its definition in float64, and so against each other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from cascade_llm.errors import BackendError
from cascade_llm.layers.fused_ops import FusedOps, HeadLayout, RMSNorm, TorchOps
from cascade_llm.layers.native_ops import NativeOps, _compiled, select_fused_ops
from cascade_llm.layers.rope import Rotation
from tests.native_code import needs_compiler

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
ROWS = (1, 3, 16, 200)


@pytest.fixture(params=[TorchOps, pytest.param(NativeOps, marks=needs_compiler)])
def make_ops(request: pytest.FixtureRequest) -> type[FusedOps]:
    return request.param


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def ops(make_ops: type[FusedOps], dtype: torch.dtype) -> FusedOps:
    return NativeOps(dtype) if make_ops is NativeOps else TorchOps()


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).mul_(scale).to(dtype)


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert got.dtype == dtype
    tolerance = factor * TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def exact_norm(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * (norm.offset + norm.weight.double())


def exact_rotation(heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_sin.double()[:, None].chunk(2, dim=-1)
    low, high = heads.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [8, 33, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(ops: FusedOps, dtype: torch.dtype, rows: int, size: int, offset: float) -> None:
    norm, x = RMSNorm(random(size, dtype=dtype), 1e-5, offset), random(rows, size, dtype=dtype, scale=3)
    before = x.clone()
    assert_near(ops.rms_norm(x, norm), exact_norm(x, norm), dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [8, 33, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_rms_norm_adds_in_place(ops: FusedOps, dtype: torch.dtype, rows: int, size: int, offset: float) -> None:
    norm, delta = RMSNorm(random(size, dtype=dtype), 1e-6, offset), random(rows, size, dtype=dtype)
    residual = random(size, rows, dtype=dtype).view(rows, size)
    total = residual + delta
    got = ops.add_rms_norm(residual, delta, norm)
    assert torch.equal(residual, total)
    assert_near(got, exact_norm(total, norm), dtype)


def test_the_norm_of_tiny_rows_is_bounded_by_eps(ops: FusedOps, dtype: torch.dtype) -> None:
    norm = RMSNorm.ones(16, 1e-5, dtype=dtype, device=CPU)
    assert float(ops.rms_norm(torch.zeros(2, 16, dtype=dtype), norm).abs().max()) == 0
    tiny = torch.full((1, 16), 1e-6, dtype=dtype)
    torch.testing.assert_close(ops.rms_norm(tiny, norm).double(), tiny.double() * 1e-5**-0.5, rtol=1e-2, atol=0)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [4, 33, 1536])
def test_silu_and_mul(ops: FusedOps, dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = random(rows, 2 * size, dtype=dtype, scale=4)
    gate, up = gate_up.double().chunk(2, dim=-1)
    got = ops.silu_and_mul(gate_up)
    assert got.is_contiguous()
    assert_near(got, gate * torch.sigmoid(gate) * up, dtype, factor=2)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [4, 33, 1536])
def test_gelu_tanh_and_mul(ops: FusedOps, dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = random(rows, 2 * size, dtype=dtype, scale=4)
    gate, up = gate_up.double().chunk(2, dim=-1)
    got = ops.gelu_tanh_and_mul(gate_up)
    assert got.is_contiguous()
    assert_near(got, F.gelu(gate, approximate="tanh") * up, dtype, factor=2)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [4, 33, 1536])
def test_clamped_swiglu(ops: FusedOps, dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = random(rows, 2 * size, dtype=dtype, scale=4)
    gate, up = gate_up.double().chunk(2, dim=-1)
    gate, up = gate.clamp(max=3), up.clamp(-3, 3)
    got = ops.clamped_swiglu(gate_up, 3.0, 1.702)
    assert got.is_contiguous()
    assert_near(got, gate * torch.sigmoid(1.702 * gate) * (up + 1), dtype, factor=2)


def test_a_norm_of_16_bits_with_an_offset_has_the_digits_of_the_sum() -> None:
    norm, x = RMSNorm(torch.full((64,), 0.0037).bfloat16(), 1e-6, 1.0), random(3, 64, dtype=torch.bfloat16)
    folded = RMSNorm((1 + norm.weight.float()).bfloat16(), 1e-6)
    ops, exact = TorchOps(), exact_norm(x, norm)
    lost = (ops.rms_norm(x, folded).double() - exact).abs().mean()
    assert (ops.rms_norm(x, norm).double() - exact).abs().mean() < lost


def test_gelu_of_large_gates_is_the_gate_or_nothing(ops: FusedOps, dtype: torch.dtype) -> None:
    gates = torch.tensor([[-1e30, -200.0, -9.0, -0.5, 0.0, 5.0, 90.0, 1e4, 1e30]], dtype=dtype)
    got = ops.gelu_tanh_and_mul(torch.cat((gates, torch.ones_like(gates)), dim=-1))
    assert_near(got, F.gelu(gates.double(), approximate="tanh"), dtype)


def test_silu_of_large_gates_is_the_gate_or_nothing(ops: FusedOps, dtype: torch.dtype) -> None:
    gates = torch.tensor([[-1e4, -200.0, -90.0, -50.0, 0.0, 50.0, 90.0, 200.0, 1e4]], dtype=dtype)
    got = ops.silu_and_mul(torch.cat((gates, torch.ones_like(gates)), dim=-1))
    assert_near(got, gates.double() * torch.sigmoid(gates.double()), dtype)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("layout", [HeadLayout(9, 3, 64), HeadLayout(1, 1, 6), HeadLayout(32, 8, 128)], ids=str)
def test_rotate(
    ops: FusedOps, dtype: torch.dtype, layout: HeadLayout, rows: int, with_norms: bool, offset: float
) -> None:
    num_heads = layout.num_rotated + layout.num_kv_heads
    qkv = random(rows, num_heads * layout.head_dim, dtype=dtype)
    norms = (
        tuple(RMSNorm(random(layout.head_dim + i, dtype=dtype)[i:], 1e-6, offset) for i in (0, 1))
        if with_norms
        else None
    )
    cos_sin = random(rows, layout.head_dim, dtype=torch.float32)
    q, k, v = (part.double() for part in layout.split(qkv.clone()))
    if norms is not None:
        q, k = exact_norm(q, norms[0]), exact_norm(k, norms[1])
    got_q, got_k, got_v = ops.rotate(qkv, layout, Rotation(cos_sin), norms)
    assert_near(got_q, exact_rotation(q, cos_sin), dtype, factor=3)
    assert_near(got_k, exact_rotation(k, cos_sin), dtype, factor=3)
    assert torch.equal(got_v.double(), v)


def exact_pairs(heads: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos_sin.double()[:, None].chunk(2, dim=-1)
    first, second = heads[..., ::2], heads[..., 1::2]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("rotary_dim", [0, 6, 48, 64])
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_a_part_of_each_head_is_rotated(
    ops: FusedOps, dtype: torch.dtype, rows: int, rotary_dim: int, is_interleaved: bool, with_norms: bool
) -> None:
    """Halves against each other or neighbours, and nothing where there is no rotation; what lies behind stays."""
    layout = HeadLayout(4, 2, 64)
    qkv = random(rows, 8 * 64, dtype=dtype)
    norms = tuple(RMSNorm(random(64 + i, dtype=dtype)[i:], 1e-6) for i in (0, 1)) if with_norms else None
    cos_sin = random(rows, rotary_dim, dtype=torch.float32)
    rotation = Rotation(cos_sin, is_interleaved=is_interleaved) if rotary_dim else None
    turn = exact_pairs if is_interleaved else exact_rotation
    expected = []
    for i, heads in enumerate(part.double() for part in layout.split(qkv.clone())[:2]):
        heads = heads if norms is None else exact_norm(heads, norms[i])
        expected.append(torch.cat((turn(heads[..., :rotary_dim], cos_sin), heads[..., rotary_dim:]), dim=-1))
    got = ops.rotate(qkv, layout, rotation, norms)
    for mine, wanted in zip(got, expected, strict=False):
        assert_near(mine, wanted, dtype, factor=3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [0, 5, 31])
def test_what_is_not_finite_stays_so(ops: FusedOps, dtype: torch.dtype, value: float, place: int) -> None:
    norm = RMSNorm.ones(32, 1e-5, dtype=dtype, device=CPU)
    x = torch.ones(2, 32, dtype=dtype)
    x[0, place] = value
    layout = HeadLayout(2, 1, 8)
    outputs = [
        ops.rms_norm(x, norm),
        ops.add_rms_norm(torch.ones_like(x), x, norm),
        ops.silu_and_mul(torch.cat((torch.ones_like(x), x), dim=-1)),
        ops.gelu_tanh_and_mul(torch.cat((torch.ones_like(x), x), dim=-1)),
        ops.rotate(x.clone(), layout, Rotation(torch.ones(2, 8)), None)[0].flatten(1),
    ]
    for output in outputs[: 4 if place >= 16 else 5]:
        assert not torch.isfinite(output[0]).all()
        assert torch.isfinite(output[1]).all()


@needs_compiler
def test_bfloat16_rounds_to_the_nearest_even(dtype: torch.dtype) -> None:
    """The sum 1 + d against torch's own rounding, for d around half a step."""
    ops, norm = NativeOps(torch.bfloat16), RMSNorm.ones(64, 1e-5, dtype=torch.bfloat16, device=CPU)
    delta = torch.linspace(-0.02, 0.02, 64).bfloat16()[None]
    residual = torch.ones(1, 64, dtype=torch.bfloat16)
    ops.add_rms_norm(residual, delta, norm)
    assert torch.equal(residual, torch.ones(1, 64, dtype=torch.bfloat16) + delta)


@needs_compiler
def test_native_serves_the_cpu_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _compiled.cache_clear()
    assert select_fused_ops(torch.bfloat16, CPU).name == "native"
    assert os.listdir(tmp_path) == []


def test_without_a_compiler_torch_serves_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    _compiled.cache_clear()
    ops = select_fused_ops(torch.float32, CPU)
    assert isinstance(ops, TorchOps)
    assert ops.reason is not None
    assert "none of gcc, clang, cc was found" in ops.reason
    _compiled.cache_clear()


def test_other_dtypes_and_devices_are_torchs() -> None:
    assert select_fused_ops(torch.float16, CPU).name == "torch"
    assert select_fused_ops(torch.float32, torch.device("cuda")).name == "torch"
    with pytest.raises(BackendError, match="not float16"):
        NativeOps(torch.float16)
