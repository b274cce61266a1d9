"""FlashInfer's elementwise operations, on the double, against torch's."""

from __future__ import annotations

import pytest
import torch

from cascade_llm.layers.flashinfer_layer_ops import FlashInferLayerOps
from cascade_llm.layers.fused_ops import HeadLayout, RMSNorm, TorchOps
from cascade_llm.layers.rope import Rotation
from tests.doubles.device import DoubleStream
from tests.doubles.flashinfer import FlashInferDouble

ROWS, SIZE = 5, 64
LAYOUT = HeadLayout(num_qo_heads=4, num_kv_heads=2, head_dim=64)


@pytest.fixture
def ops() -> FlashInferLayerOps:
    return FlashInferLayerOps(FlashInferDouble(DoubleStream(), exact=True).ops(), torch.device("cpu"), max_rows=8)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms(ops: FlashInferLayerOps, offset: float) -> None:
    norm, x, delta = RMSNorm(random(SIZE), 1e-5, offset), random(ROWS, SIZE, seed=1), random(ROWS, SIZE, seed=2)
    torch.testing.assert_close(ops.rms_norm(x, norm), TorchOps().rms_norm(x, norm))
    mine, twin = x.clone(), x.clone()
    torch.testing.assert_close(ops.add_rms_norm(mine, delta.clone(), norm), TorchOps().add_rms_norm(twin, delta, norm))
    torch.testing.assert_close(mine, twin)


@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_rotate(ops: FlashInferLayerOps, offset: float | None) -> None:
    norms = None if offset is None else tuple(RMSNorm(random(64, seed=seed), 1e-6, offset) for seed in (3, 4))
    qkv, angles = random(ROWS, 8 * 64, seed=5), random(ROWS, 32, seed=6)
    rotation = Rotation(torch.cat((angles.cos(), angles.sin()), dim=-1))
    expected = TorchOps().rotate(qkv.clone(), LAYOUT, rotation, norms)
    for got, wanted in zip(ops.rotate(qkv.clone(), LAYOUT, rotation, norms), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rotary_dim", [None, 32, 64])
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_a_part_of_each_head_is_rotated(ops: FlashInferLayerOps, rotary_dim: int | None, is_interleaved: bool) -> None:
    qkv, rotation = random(ROWS, 8 * 64, seed=5), None
    if rotary_dim is not None:
        rotation = Rotation(random(ROWS, rotary_dim, seed=6), is_interleaved=is_interleaved)
    expected = TorchOps().rotate(qkv.clone(), LAYOUT, rotation, None)
    for got, wanted in zip(ops.rotate(qkv.clone(), LAYOUT, rotation, None), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_silu_and_mul(ops: FlashInferLayerOps) -> None:
    gate_up = random(ROWS, 2 * SIZE, seed=7)
    torch.testing.assert_close(ops.silu_and_mul(gate_up), TorchOps().silu_and_mul(gate_up))


def test_other_gates_are_torchs(ops: FlashInferLayerOps) -> None:
    gate_up = random(ROWS, 2 * SIZE, seed=8)
    assert torch.equal(ops.gelu_tanh_and_mul(gate_up), TorchOps().gelu_tanh_and_mul(gate_up))
    assert torch.equal(ops.clamped_swiglu(gate_up, 1.0, 1.7), TorchOps().clamped_swiglu(gate_up, 1.0, 1.7))
