from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec, StepAttention
from cascade_llm.attention.reference import reference_attention
from cascade_llm.attention.segment_batch import Blocking
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.errors import BackendError
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan
from cascade_llm.validation.cases import CaseChoices
from tests.cascade_cases import CascadeCase, cascade_case, make_level, pool_with_only, single_level

NUM_CASES = 320
SEEDS = [*range(160), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(160, NUM_CASES))]
# bfloat16 rounds a score s by up to s * 2**-9, and with it the log-sum-exp; scores reach about 5 here
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}
SMALL_BLOCKS = Blocking(scores_per_block=64, gathered_bytes_per_batch=20_000, batch_overhead=64)
PAGE_SIZE = 4


def spec_for(kv_cache: PagedKVCache, group_size: int, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(
        num_layers=kv_cache.num_layers,
        num_qo_heads=kv_cache.num_kv_heads * group_size,
        num_kv_heads=kv_cache.num_kv_heads,
        head_dim=kv_cache.head_dim,
        sm_scale=kv_cache.head_dim**-0.5,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def backend_for(
    case: CascadeCase, dtype: torch.dtype, seed: int, blocking: Blocking | None = None
) -> TorchAttentionBackend:
    kv_cache = pool_with_only(case, num_layers=1, dtype=dtype, seed=seed)
    return TorchAttentionBackend(spec_for(kv_cache, case.group_size, dtype), kv_cache, blocking)


def random_q(backend: TorchAttentionBackend, num_rows: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (num_rows, backend.spec.num_qo_heads, backend.spec.head_dim)
    return torch.randn(shape, generator=generator).to(backend.spec.dtype)


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; infinite where there is a NaN."""
    return (a.double() - b.double()).abs().nan_to_num(nan=torch.inf).max().item()


def assert_right(backend: TorchAttentionBackend, plan: CascadePlan, q: torch.Tensor, note: object = "") -> None:
    out, lse = backend.prepare(plan).attend(0, q)
    spec = backend.spec
    expected_out, expected_lse = reference_attention(
        plan, backend.kv_cache, 0, q, spec.sm_scale, soft_cap=spec.logits_soft_cap
    )
    assert (out.dtype, lse.dtype) == (q.dtype, torch.float32)
    assert worst(out, expected_out) < TOLERANCE[q.dtype], note
    assert worst(lse, expected_lse) < TOLERANCE[q.dtype], note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_dense_float64(seed: int, dtype: torch.dtype) -> None:
    """Also that nothing leaks: the pool is NaN wherever no sequence of the case may read."""
    case = cascade_case(seed)
    backend = backend_for(case, dtype, seed, SMALL_BLOCKS if seed % 2 else None)
    q = random_q(backend, case.plan.num_rows, seed)
    assert_right(backend, case.plan, q, case)
    assert_right(backend, single_level(case), q, case)


@pytest.mark.parametrize("soft_cap", [1.5, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(24))
def test_equals_dense_float64_with_a_soft_cap(seed: int, dtype: torch.dtype, soft_cap: float) -> None:
    case = cascade_case(seed)
    plain = backend_for(case, dtype, seed)
    backend = TorchAttentionBackend(replace(plain.spec, logits_soft_cap=soft_cap), plain.kv_cache)
    q = random_q(backend, case.plan.num_rows, seed)
    assert_right(backend, case.plan, q, case)
    assert_right(backend, single_level(case), q, case)


def test_cases_are_of_every_kind() -> None:
    cases = [cascade_case(seed) for seed in range(NUM_CASES)]
    plans = [case.plan for case in cases]
    assert {len(plan.levels) for plan in plans} == {1, 2, 3, 4}
    assert {plan.page_size for plan in plans} == {1, 2, 4, 16, 64}
    assert any(plan.num_rows == 1 for plan in plans)
    assert any(plan.window_len is not None for plan in plans)
    assert any(plan.num_rows > plan.leaf.num_segments > 1 for plan in plans)
    shared = [level for plan in plans for level in plan.shared_levels]
    assert any(not len(level.kv_page_indices) for level in shared)
    assert any(0 in level.kv_last_page_len and len(level.kv_page_indices) for level in shared)
    assert any(level.num_segments > 2 and len(level.kv_page_indices) for level in shared)


def test_bfloat16_error_is_the_same_with_and_without_cascade() -> None:
    errors: dict[str, list[torch.Tensor]] = {"cascade": [], "one level": []}
    for seed in range(100):
        case = cascade_case(seed)
        backend = backend_for(case, torch.bfloat16, seed)
        q = random_q(backend, case.plan.num_rows, seed)
        expected, _ = reference_attention(case.plan, backend.kv_cache, 0, q, backend.spec.sm_scale)
        for name, plan in (("cascade", case.plan), ("one level", single_level(case))):
            errors[name].append((backend.prepare(plan).attend(0, q)[0] - expected).flatten())
    rms = {name: torch.cat(parts).square().mean().sqrt().item() for name, parts in errors.items()}
    assert 0 < rms["cascade"] < 1.2 * rms["one level"] < 1.5 * rms["cascade"]


def test_float16() -> None:
    case = cascade_case(3)
    backend = backend_for(case, torch.float16, 3)
    assert_right(backend, case.plan, random_q(backend, case.plan.num_rows))


def test_pool_of_another_dtype_is_read_in_the_dtype_of_the_model() -> None:
    case = cascade_case(3)
    kv_cache = pool_with_only(case, num_layers=1, dtype=torch.bfloat16, seed=3)
    backend = TorchAttentionBackend(spec_for(kv_cache, case.group_size, torch.float32), kv_cache)
    assert_right(backend, case.plan, random_q(backend, case.plan.num_rows))


def test_strided_queries() -> None:
    case = cascade_case(3)
    backend = backend_for(case, torch.float32, 3)
    q = random_q(backend, case.plan.num_rows)
    qkv = torch.cat((q, torch.full_like(q, torch.nan)), dim=1)
    assert_right(backend, case.plan, qkv[:, : q.shape[1]])


def test_failed_keys_reach_their_own_sequence_only() -> None:
    backend, level = shared_prefix_backend()
    plan = plan_behind(level, own_pages=(3, 4, 5))
    k, v = torch.full((2, 1, 2, 8), torch.nan)
    backend.kv_cache.write(0, k, v, torch.tensor([4 * PAGE_SIZE]))
    out, lse = backend.prepare(plan).attend(0, random_q(backend, 3))
    assert out.isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert lse.isnan().flatten(1).any(1).tolist() == [False, True, False]


def shared_prefix_backend(max_kept_bytes: int = 1 << 20) -> tuple[TorchAttentionBackend, CascadeLevel]:
    """A pool of six pages, and a level that shares three of them among three rows."""
    kv_cache = PagedKVCache(
        num_layers=1, num_pages=6, page_size=PAGE_SIZE, num_kv_heads=2, head_dim=8, dtype=torch.float32
    )
    kv_cache.layer(0).normal_(generator=torch.Generator().manual_seed(0))
    spec = spec_for(kv_cache, 2, torch.float32)
    return TorchAttentionBackend(spec, kv_cache, max_kept_bytes=max_kept_bytes), make_level([(3, (2, 0, 1), PAGE_SIZE)])


def plan_behind(level: CascadeLevel, own_pages: tuple[int, ...] = (3, 4, 5), last_page_len: int = 2) -> CascadePlan:
    plan = CascadePlan((level, make_level([(1, (page,), last_page_len) for page in own_pages])), PAGE_SIZE)
    plan.check()
    return plan


def overwrite(kv_cache: PagedKVCache, page: int, value: float) -> None:
    k, v = torch.full((2, PAGE_SIZE, 2, 8), value)
    kv_cache.write(0, k, v, torch.arange(page * PAGE_SIZE, (page + 1) * PAGE_SIZE))


def test_pages_may_be_written_between_prepare_and_attend() -> None:
    backend, level = shared_prefix_backend()
    plan, q = plan_behind(level), random_q(backend, 3)
    prepared = backend.prepare(plan)
    overwrite(backend.kv_cache, 2, 0.5)
    overwrite(backend.kv_cache, 4, 0.25)
    out, lse = prepared.attend(0, q)
    expected_out, expected_lse = reference_attention(plan, backend.kv_cache, 0, q, backend.spec.sm_scale)
    assert worst(out, expected_out) < 1e-5
    assert worst(lse, expected_lse) < 1e-5


def test_a_level_that_lasts_is_gathered_once() -> None:
    backend, level = shared_prefix_backend()
    for step in (1, 2, 3):
        assert_right(backend, plan_behind(level, last_page_len=step), random_q(backend, 3))
    overwrite(backend.kv_cache, 0, torch.nan)  # breaks the contract, and so shows that the page is not read again
    out, _ = backend.prepare(plan_behind(level)).attend(0, random_q(backend, 3))
    assert out.isfinite().all()


def test_another_level_over_the_same_pages_is_read_anew() -> None:
    backend, level = shared_prefix_backend()
    for _ in range(3):
        assert_right(backend, plan_behind(level), random_q(backend, 3))
    overwrite(backend.kv_cache, 0, 0.5)
    twin = CascadeLevel(level.qo_indptr, level.kv_page_indptr, level.kv_page_indices, level.kv_last_page_len)
    for _ in range(3):
        assert_right(backend, plan_behind(twin), random_q(backend, 3))


def test_what_a_plan_does_not_name_is_forgotten() -> None:
    backend, level = shared_prefix_backend()
    for _ in range(3):
        assert_right(backend, plan_behind(level), random_q(backend, 3))
    backend.prepare(plan_behind(make_level([(3, (), 0)])))
    overwrite(backend.kv_cache, 0, 0.5)
    assert_right(backend, plan_behind(level), random_q(backend, 3))


def test_without_memory_to_keep_them_pages_are_read_every_step() -> None:
    backend, level = shared_prefix_backend(max_kept_bytes=0)
    for value in (0.5, 0.25, 0.125):
        assert_right(backend, plan_behind(level), random_q(backend, 3))
        overwrite(backend.kv_cache, 0, value)
    assert_right(backend, plan_behind(level), random_q(backend, 3))


def test_other_layout_is_refused_with_the_cure() -> None:
    kv_cache = PagedKVCache(
        num_layers=1, num_pages=1, page_size=4, num_kv_heads=1, head_dim=8, dtype=torch.float32, layout="HND"
    )
    with pytest.raises(BackendError, match="NHD"):
        TorchAttentionBackend(spec_for(kv_cache, 1, torch.float32), kv_cache)


@pytest.mark.parametrize("seed", range(6))
def test_each_layer_reads_by_the_plan_of_its_kind(seed: int) -> None:
    """Kind 0 shares levels and reads everything; kind 1 has a window and reads the same pages in one level."""
    case = cascade_case(seed, CaseChoices(num_shared_levels=2, num_sequences=5, window=False))
    full, windowed = case.plan, CascadePlan(single_level(case).levels, case.plan.page_size, window_len=5)
    kinds = (0, 1, 1)
    kv_cache = pool_with_only(case, num_layers=len(kinds), dtype=torch.float32, seed=seed)
    backend = TorchAttentionBackend(spec_for(kv_cache, case.group_size, torch.float32), kv_cache)
    q = random_q(backend, full.num_rows)
    prepared = [backend.prepare(plan) for plan in (full, windowed)]
    slots = torch.empty(0, dtype=torch.int64)
    attention = StepAttention(prepared, backend, [slots], kinds)
    no_rows = q.new_empty(0, kv_cache.num_kv_heads, kv_cache.head_dim)
    for layer, kind in enumerate(kinds):
        plan = (full, windowed)[kind]
        expected, _ = reference_attention(plan, kv_cache, layer, q, backend.spec.sm_scale)
        assert worst(attention(layer, q, no_rows, no_rows), expected) < TOLERANCE[q.dtype]
