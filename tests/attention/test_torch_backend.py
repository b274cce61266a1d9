from __future__ import annotations

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.reference import reference_attention
from cascade_llm.attention.segment_batch import Blocking
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from tests.cascade_cases import CascadeCase, cascade_case, pool_with_only, single_level

NUM_CASES = 320
BFLOAT16_TOLERANCE = 0.03
SMALL_BLOCKS = Blocking(scores_per_block=64, gathered_bytes_per_batch=20_000, batch_overhead=64)


def backend_for(case: CascadeCase, dtype: torch.dtype, seed: int, blocking: Blocking | None) -> TorchAttentionBackend:
    kv_cache = pool_with_only(case, num_layers=1, dtype=dtype, seed=seed)
    spec = AttentionSpec(
        num_layers=1,
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        sm_scale=case.head_dim**-0.5,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    return TorchAttentionBackend(spec, kv_cache, blocking)


def queries(case: CascadeCase, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(case.plan.num_rows, case.num_qo_heads, case.head_dim, generator=generator).to(dtype)


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    difference = (a.double() - b.double()).abs().max().item()
    return float("inf") if difference != difference else difference


@pytest.mark.parametrize("seed", range(NUM_CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_dense_float64(seed: int, dtype: torch.dtype) -> None:
    case = cascade_case(seed)
    backend = backend_for(case, dtype, seed, SMALL_BLOCKS if seed % 2 else None)
    q = queries(case, dtype, seed)
    expected_out, expected_lse = reference_attention(case.plan, backend.kv_cache, 0, q, backend.spec.sm_scale)
    tolerance = 1e-5 if dtype == torch.float32 else BFLOAT16_TOLERANCE
    for plan in (case.plan, single_level(case)):
        out, lse = backend.prepare(plan).attend(0, q)
        assert out.dtype == dtype
        assert lse.dtype == torch.float32
        assert worst(out, expected_out) < tolerance, case
        assert worst(lse, expected_lse) < tolerance, case
