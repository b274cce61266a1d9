"""Sinks after the levels' merge against a softmax that has them from the start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cascade_llm.attention.backend import AttentionBackend, StepAttention
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.native_backend import NativeAttentionBackend
from cascade_llm.attention.reference import reference_attention
from cascade_llm.attention.sinks import apply_sinks
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from tests.attention.test_torch_backend import spec_for, worst
from tests.cascade_cases import cascade_case, pool_with_only, single_level
from tests.doubles.device import DoubleStream
from tests.doubles.flashinfer import FlashInferDouble
from tests.native_code import expect_native

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03}


def backend_of(name: str, kv_cache: PagedKVCache, group_size: int, dtype: torch.dtype) -> AttentionBackend:
    spec = spec_for(kv_cache, group_size, dtype)
    if name == "flashinfer":
        double = FlashInferDouble(DoubleStream(), exact=dtype == torch.float32)
        return FlashInferAttentionBackend(spec, kv_cache, double.platform())
    if name == "native":
        expect_native()
    return {"native": NativeAttentionBackend, "torch": TorchAttentionBackend}[name](spec, kv_cache)


@pytest.mark.parametrize("name", ["torch", "native", "flashinfer"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_equals_a_softmax_with_one_more_key(name: str, dtype: torch.dtype, seed: int) -> None:
    """Through `StepAttention`, with shared levels and without."""
    case = cascade_case(seed)
    if name == "flashinfer":
        case = replace(case, head_dim=64)
    generator = torch.Generator().manual_seed(seed)
    kv_cache = pool_with_only(case, num_layers=1, dtype=dtype, seed=seed)
    backend = backend_of(name, kv_cache, case.group_size, dtype)
    shape = (case.plan.num_rows, backend.spec.num_qo_heads, backend.spec.head_dim)
    q = torch.randn(shape, generator=generator).to(dtype)
    sinks = torch.randn(backend.spec.num_qo_heads, generator=generator) * 3
    k = torch.empty(0, kv_cache.num_kv_heads, kv_cache.head_dim, dtype=dtype)
    no_slots = torch.empty(0, dtype=backend.slot_dtype)
    for plan in (case.plan, single_level(case)):
        expected, _ = reference_attention(plan, kv_cache, 0, q, backend.spec.sm_scale, sinks=sinks)
        attention = StepAttention([backend.prepare(plan)], backend, [no_slots])
        assert worst(attention(0, q, k, k, sinks), expected) < TOLERANCE[dtype]


def test_of_rows_without_keys_nothing_is_left() -> None:
    out, lse = torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)
    assert torch.equal(apply_sinks(out, lse, torch.tensor([-5.0, 0.0, 5.0])), torch.zeros(2, 3, 4))


def test_a_sink_of_minus_infinity_takes_nothing() -> None:
    out = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    sinks = torch.full((3,), -torch.inf)
    assert torch.equal(apply_sinks(out.clone(), torch.zeros(2, 3), sinks), out)
