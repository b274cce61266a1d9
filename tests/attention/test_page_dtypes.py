"""Pages of every dtype under activations of every dtype: compiled kernels and their twin against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec
from cascade_llm.attention.native_backend import NativeAttentionBackend, Sharing
from cascade_llm.attention.native_kernels import kernels_for
from cascade_llm.attention.reference import reference_attention
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.device.cpu_levels import LEVEL_VARIABLE, LEVELS, CpuLevel, architecture, reason_against
from cascade_llm.kv_cache.paged_kv_cache import KVScale, PagedKVCache
from cascade_llm.validation.cases import pool_with_only
from tests.attention.test_torch_backend import TOLERANCE, worst
from tests.cascade_cases import CascadeCase, cascade_case
from tests.native_code import needs_compiler

COMPUTED = (torch.float32, torch.bfloat16)
PAGES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
PAIRS = [pair for pair in itertools.product(COMPUTED, PAGES) if pair[0] != pair[1]]
HERE = [level for level in LEVELS[architecture()] if reason_against(level) is None]
HALF = {(torch.float32, torch.int8), (torch.bfloat16, torch.float16)}
"""The pairs of levels that most processors have, in `make test`; there this processor's own level has all, and the
others have the first. Each pair of a level is a library that takes seconds to compile."""


def is_often(level: CpuLevel, dtype: torch.dtype, pages: torch.dtype) -> bool:
    if level is HERE[-1] or (dtype, pages) == (torch.float32, torch.int8):
        return True
    return level.name in ("avx2", "avx512bf16") and (dtype, pages) in HALF


OF_LEVELS = [
    pytest.param(
        *case, marks=() if is_often(*case) else pytest.mark.slow, id="-".join([case[0].name, *map(str, case[1:])])
    )
    for case in itertools.product(HERE, COMPUTED, PAGES)
]


def spec_of(kv_cache: PagedKVCache, group_size: int, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(
        num_layers=1,
        num_qo_heads=kv_cache.num_kv_heads * group_size,
        num_kv_heads=kv_cache.num_kv_heads,
        head_dim=kv_cache.head_dim,
        sm_scale=kv_cache.head_dim**-0.5,
        dtype=dtype,
        device=torch.device("cpu"),
        kv_dtype=kv_cache.dtype,
    )


def in_parts(spec: AttentionSpec, kv_cache: PagedKVCache) -> NativeAttentionBackend:
    """The kernels with even small loads cut into many parts."""
    return NativeAttentionBackend(spec, kv_cache, Sharing(num_threads=3, smallest_task=1))


def assert_right(
    backend: Callable[[AttentionSpec, PagedKVCache], AttentionBackend],
    case: CascadeCase,
    dtype: torch.dtype,
    pages: torch.dtype,
    seed: int,
) -> None:
    scales = [KVScale(0.5, 0.75)] if pages == torch.float8_e4m3fn else None
    kv_cache = pool_with_only(case, num_layers=1, dtype=pages, seed=seed, scales=scales)
    spec = replace(spec_of(kv_cache, case.group_size, dtype), logits_soft_cap=5.0 if seed % 3 == 0 else None)
    generator = torch.Generator().manual_seed(seed + 1)
    q = torch.randn(case.plan.num_rows, spec.num_qo_heads, spec.head_dim, generator=generator).to(dtype)
    out, lse = backend(spec, kv_cache).prepare(case.plan).attend(0, q)
    expected_out, expected_lse = reference_attention(
        case.plan, kv_cache, 0, q, spec.sm_scale, soft_cap=spec.logits_soft_cap
    )
    assert worst(out, expected_out) < TOLERANCE[dtype], case
    assert worst(lse, expected_lse) < TOLERANCE[dtype], case


@needs_compiler
@pytest.mark.parametrize(("level", "dtype", "pages"), OF_LEVELS)
def test_the_kernels_of_every_level_equal_float64(
    level: CpuLevel, dtype: torch.dtype, pages: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, level.name)
    kernels_for.cache_clear()
    try:
        for seed in range(40):
            case = cascade_case(seed)
            if case.head_dim == 24:
                assert_right(in_parts if seed % 2 else NativeAttentionBackend, case, dtype, pages, seed)
    finally:
        kernels_for.cache_clear()


@pytest.mark.parametrize(("dtype", "pages"), PAIRS, ids=str)
def test_the_twin_equals_float64(dtype: torch.dtype, pages: torch.dtype) -> None:
    for seed in range(8):
        assert_right(TorchAttentionBackend, cascade_case(seed), dtype, pages, seed)


@needs_compiler
@pytest.mark.parametrize(("dtype", "pages"), PAIRS, ids=str)
def test_the_kernels_store_what_the_twin_stores(dtype: torch.dtype, pages: torch.dtype) -> None:
    """Rounded, beyond the largest number, subnormal, zero, infinite and NaN: the same bits and scales."""
    scales = [KVScale(0.5, 0.75)] if pages == torch.float8_e4m3fn else None
    native, twin = (
        PagedKVCache(num_layers=1, num_pages=4, page_size=4, num_kv_heads=2, head_dim=24, dtype=pages, scales=scales)
        for _ in range(2)
    )
    k, v = (10 ** torch.linspace(-9, 6, 2 * 16 * 2 * 24)).view(2, 16, 2, 24).to(dtype)
    k[::2], v[3], v[4, 0, 0], v[5, 0, 1] = -k[::2], 0, torch.nan, torch.inf
    slots = torch.arange(16)
    NativeAttentionBackend(spec_of(native, 1, dtype), native).write(0, k, v, slots)
    twin.write(0, k, v, slots)
    for mine, its in zip(native.read(0, slots), twin.read(0, slots), strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=0, equal_nan=True)
    assert twin.read(0, slots)[1][4, 0, 0].isnan()
