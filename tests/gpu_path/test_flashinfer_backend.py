"""The eager FlashInfer backend, on the double, against dense float64 attention."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.levels import DecodeKernel
from cascade_llm.attention.flashinfer.window_cut import cut_leaf
from cascade_llm.attention.reference import reference_attention
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import CascadePlan
from tests.attention.test_scheduled_plans import one_level
from tests.cascade_cases import CascadeCase, cascade_case, make_level, pool_with_only
from tests.doubles.device import DoubleStream
from tests.doubles.flashinfer import FlashInferDouble
from tests.scheduler.generated import KINDS, generated_steps, random_config

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def case_of(seed: int) -> CascadeCase:
    return replace(cascade_case(seed), head_dim=64)


def spec_of(case: CascadeCase, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(
        num_layers=2,
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        sm_scale=case.head_dim**-0.5,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def backend_of(
    case: CascadeCase,
    pool: PagedKVCache,
    *,
    dtype: torch.dtype = torch.float32,
    num_sm: int = 132,
    decode_leaf: DecodeKernel | None = None,
    soft_cap: float | None = None,
) -> tuple[FlashInferAttentionBackend, FlashInferDouble]:
    stream = DoubleStream()
    double = FlashInferDouble(stream, num_sm=num_sm, exact=dtype == torch.float32)
    spec = replace(spec_of(case, dtype), logits_soft_cap=soft_cap)
    return FlashInferAttentionBackend(spec, pool, double.platform(), decode_leaf), double


def random_q(case: CascadeCase, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(case.plan.num_rows, case.num_qo_heads, case.head_dim, generator=generator).to(dtype)


def assert_equals_reference(
    backend: FlashInferAttentionBackend, case: CascadeCase, plan: CascadePlan, pool: PagedKVCache, q: torch.Tensor
) -> None:
    prepared, spec = backend.prepare(plan), backend.spec
    for layer in range(pool.num_layers):
        out, lse = prepared.attend(layer, q)
        expected_out, expected_lse = reference_attention(
            plan, pool, layer, q, spec.sm_scale, soft_cap=spec.logits_soft_cap
        )
        tolerance = TOLERANCE[q.dtype]
        torch.testing.assert_close(out.double(), expected_out, atol=tolerance, rtol=tolerance, msg=str(case))
        torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance, msg=str(case))


@pytest.mark.parametrize("seed", range(40))
def test_equals_dense_attention(seed: int) -> None:
    case = case_of(seed)
    pool = pool_with_only(case, num_layers=2, dtype=torch.float32, seed=seed)
    backend, _ = backend_of(case, pool)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, torch.float32))


@pytest.mark.parametrize("seed", range(10))
def test_equals_dense_attention_with_a_soft_cap(seed: int) -> None:
    case = case_of(seed)
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=seed)
    backend, _ = backend_of(case, pool, soft_cap=2.0)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, torch.float32))


@pytest.mark.parametrize("seed", range(40, 48))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_dense_attention_in_16_bits(seed: int, dtype: torch.dtype) -> None:
    case = case_of(seed)
    pool = pool_with_only(case, num_layers=1, dtype=dtype, seed=seed)
    backend, _ = backend_of(case, pool, dtype=dtype)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, dtype))


def decode_case(kv_lens: list[int], shared_pages: int, *, group_size: int = 4, page_size: int = 16) -> CascadeCase:
    """One shared run over all sequences, one row each."""
    shared = list(range(shared_pages))
    tables, leaf, page = [], [], shared_pages
    for kv_len in kv_lens:
        own = list(range(page, page + -(-kv_len // page_size)))
        page += len(own)
        tables.append(shared + own)
        leaf.append((1, own, kv_len - (len(own) - 1) * page_size))
    levels = (make_level([(len(kv_lens), shared, page_size)]), make_level(leaf)) if shared else (make_level(leaf),)
    plan = CascadePlan(levels, page_size)
    plan.check(tables)
    return CascadeCase(plan, tables, page + 1, 2, group_size, 64)


@pytest.mark.parametrize("num_sm", [2, 132])
@pytest.mark.parametrize("group_size", [1, 4])
def test_split_kv_is_merged_in_decode(num_sm: int, group_size: int) -> None:
    """Lengths that the kernels cut in chunks: by the planner's arithmetic, 128 tokens at least."""
    case = decode_case([700, 3, 130, 16], 40, group_size=group_size)
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=1)
    backend, _ = backend_of(case, pool, num_sm=num_sm)
    assert backend.decode_leaf == ("decode_cuda_cores" if group_size == 1 else "decode_tensor_cores")
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, torch.float32))


@pytest.mark.parametrize("decode_leaf", ["decode_tensor_cores", "decode_cuda_cores"])
def test_every_decode_kernel_gives_the_same(decode_leaf: DecodeKernel) -> None:
    case = decode_case([100, 33, 16, 1, 260], 3)
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=2)
    backend, _ = backend_of(case, pool, decode_leaf=decode_leaf)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, torch.float32))


def test_sliding_window_masks_the_leaf() -> None:
    case = decode_case([100, 33, 16, 1, 70], 0)
    plan = CascadePlan(case.plan.levels, case.plan.page_size, window_len=20)
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=3)
    backend, _ = backend_of(case, pool)
    assert_equals_reference(backend, case, plan, pool, random_q(case, torch.float32))


def test_kinds_of_one_step_keep_their_shared_levels_apart() -> None:
    """Both cascades are prepared before either runs. Their shared runs differ: 4 pages, and the first 2 of them."""
    case, other = decode_case([20, 30, 40], 4), decode_case([20 + 32, 30 + 32, 40 + 32], 2)
    pool = pool_with_only(other, num_layers=1, dtype=torch.float32, seed=5)
    for pages in pool.layer(0):
        pages.nan_to_num_()  # the two plans read different slots
    backend, _ = backend_of(case, pool)
    windowed = CascadePlan(other.plan.levels, other.plan.page_size, window_len=200)  # every sequence fits
    q = random_q(case, torch.float32)
    prepared = [backend.prepare(plan) for plan in (case.plan, windowed)]
    for plan, ready in zip((case.plan, windowed), prepared, strict=True):
        out, lse = ready.attend(0, q)
        expected_out, expected_lse = reference_attention(plan, pool, 0, q, backend.spec.sm_scale)
        torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def test_a_shared_level_is_planned_once_for_as_long_as_it_is_the_same_object() -> None:
    case = decode_case([20, 30, 40], 4)
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=4)
    backend, double = backend_of(case, pool)
    q = random_q(case, torch.float32)
    assert_equals_reference(backend, case, case.plan, pool, q)
    assert double.num_plans == 2
    assert_equals_reference(backend, case, case.plan, pool, q)
    assert double.num_plans == 3  # the leaf alone
    renewed = CascadePlan((make_level([(3, range(4), 16)]), case.plan.leaf), 16)
    assert_equals_reference(backend, case, renewed, pool, q)
    assert double.num_plans == 5


def test_empty_segments_at_the_end_are_left_out_of_the_kernel() -> None:
    case = decode_case([20, 30, 40], 4)
    alone = make_level([(1, [], 0), (1, [], 0), (1, [0, 1], 16)])
    behind = make_level([(1, [0, 1], 16), (2, [], 0)])
    nothing = make_level([(3, [], 0)])
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=5)
    backend, double = backend_of(case, pool)
    for shared, num_runs in ((alone, 2), (behind, 2), (nothing, 1)):
        plan = CascadePlan((shared, case.plan.leaf), 16)
        plan.check()
        before = double.num_runs
        assert_equals_reference(backend, case, plan, pool, random_q(case, torch.float32))
        assert double.num_runs - before == num_runs


def test_write_puts_rows_where_their_slots_are() -> None:
    case = decode_case([20, 30, 40], 4)
    pool = pool_with_only(case, num_layers=2, dtype=torch.float32, seed=6)
    backend, _ = backend_of(case, pool)
    assert backend.slot_dtype == torch.int32
    heads = torch.randn(3, 4, case.num_kv_heads, 64)  # k and v are views of one projection
    k, v = heads[:, 0], heads[:, 3]
    slots = torch.tensor([5, 64, 17], dtype=torch.int32)
    backend.write(1, k, v, slots)
    written_k, written_v = pool.read(1, slots.long())
    assert torch.equal(written_k, k)
    assert torch.equal(written_v, v)


def num_cut_leaves(seed: int, kinds: tuple[int | None, ...], num_steps: int) -> int:
    """Compare scheduled plans of kinds with windows with dense attention; returns how many had windows that cut a leaf
    from segment to segment otherwise, so that it was read as an edge and the rest."""
    generator, num_pages, found = torch.Generator().manual_seed(seed), 200, 0
    config = replace(random_config(random.Random(seed)), attention_kinds=kinds)
    pool = PagedKVCache(
        num_layers=1,
        num_pages=num_pages,
        page_size=config.page_size,
        num_kv_heads=2,
        head_dim=64,
        dtype=torch.float32,
    )
    pool.layer(0).normal_(generator=generator)
    backend = None
    for step, tables in generated_steps(seed, num_steps, config=config):
        case = CascadeCase(step.cascade, tables, num_pages, 2, 3, 64)
        backend = backend or backend_of(case, pool)[0]
        q = torch.randn(step.num_rows, 6, 64, generator=generator)
        for plan in step.cascades:
            found += cut_leaf(plan) is not None
            out, lse = backend.prepare(plan).attend(0, q)
            dense = one_level(plan, tables)
            expected_out, expected_lse = reference_attention(dense, pool, 0, q, backend.spec.sm_scale)
            torch.testing.assert_close(out.double(), expected_out, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    return found


def test_what_windows_cut_off_shared_prefixes_is_read_row_by_row() -> None:
    assert num_cut_leaves(1, (9,), 30) + num_cut_leaves(7, (None, 12), 40) > 15


@pytest.mark.slow
def test_scheduled_plans_with_windows_equal_dense_attention() -> None:
    assert sum(num_cut_leaves(seed, KINDS[seed % len(KINDS)], 60) for seed in range(40)) > 200
