"""The compiled kernels against dense float64 attention, and against their torch twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cascade_llm.attention.backend import PreparedAttention
from cascade_llm.attention.native_backend import NativeAttentionBackend, Sharing
from cascade_llm.attention.reference import reference_attention
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.errors import BackendError
from cascade_llm.kv_cache.paged_kv_cache import KVLayout, PagedKVCache
from cascade_llm.plan import CascadePlan
from cascade_llm.validation.cases import single_level_plan
from tests.attention.test_torch_backend import SEEDS, TOLERANCE, random_q, spec_for, worst
from tests.cascade_cases import CascadeCase, cascade_case, make_level, pool_with_only, single_level
from tests.native_code import needs_compiler

pytestmark = needs_compiler

CUT_SMALL = Sharing(num_threads=3, smallest_task=1)
"""Cuts even small loads into many parts."""


def backend_for(
    case: CascadeCase,
    dtype: torch.dtype,
    seed: int,
    sharing: Sharing | None = None,
    soft_cap: float | None = None,
) -> NativeAttentionBackend:
    kv_cache = pool_with_only(case, num_layers=1, dtype=dtype, seed=seed)
    spec = replace(spec_for(kv_cache, case.group_size, dtype), logits_soft_cap=soft_cap)
    return NativeAttentionBackend(spec, kv_cache, sharing)


def pool(
    num_pages: int, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, layout: KVLayout = "NHD"
) -> PagedKVCache:
    kv_cache = PagedKVCache(
        num_layers=1,
        num_pages=num_pages,
        page_size=page_size,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        layout=layout,
    )
    kv_cache.layer(0).normal_(generator=torch.Generator().manual_seed(0))
    return kv_cache


def assert_right(backend: NativeAttentionBackend, plan: CascadePlan, q: torch.Tensor, note: object = "") -> None:
    out, lse = backend.prepare(plan).attend(0, q)
    spec = backend.spec
    expected_out, expected_lse = reference_attention(
        plan, backend.kv_cache, 0, q, spec.sm_scale, soft_cap=spec.logits_soft_cap
    )
    assert (out.dtype, lse.dtype, out.shape) == (q.dtype, torch.float32, q.shape)
    assert worst(out, expected_out) < TOLERANCE[q.dtype], note
    assert worst(lse, expected_lse) < TOLERANCE[q.dtype], note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", SEEDS)
def test_equals_dense_float64(seed: int, dtype: torch.dtype) -> None:
    """Also that nothing leaks: the pool is NaN wherever no sequence of the case may read."""
    case = cascade_case(seed)
    backend = backend_for(case, dtype, seed, CUT_SMALL if seed % 2 else None)
    q = random_q(backend, case.plan.num_rows, seed)
    assert_right(backend, case.plan, q, case)
    assert_right(backend, single_level(case), q, case)


@pytest.mark.parametrize("soft_cap", [1.5, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(24))
def test_equals_dense_float64_with_a_soft_cap(seed: int, dtype: torch.dtype, soft_cap: float) -> None:
    case = cascade_case(seed)
    backend = backend_for(case, dtype, seed, CUT_SMALL if seed % 2 else None, soft_cap)
    q = random_q(backend, case.plan.num_rows, seed)
    assert_right(backend, case.plan, q, case)
    assert_right(backend, single_level(case), q, case)


LONG = [
    ("decode behind a long prefix", [[(9, 1500)]], [(1, 40 + i) for i in range(9)], None),
    ("two groups, two levels", [[(40, 640)], [(25, 300), (15, 0)]], [(1, 130)] * 40, None),
    ("one long sequence", [], [(1, 3001)], None),
    ("many rows behind a prefix", [[(200, 256)]], [(50, 50), (30, 200), (120, 120)], None),
    ("a long prompt", [], [(700, 700)], None),
    ("a chunk of a long prompt", [], [(130, 900)], None),
    ("a window", [], [(300, 700), (1, 900)], 129),
]


def long_plan(
    shared: list[list[tuple[int, int]]], leaf: list[tuple[int, int]], window_len: int | None, page_size: int
) -> tuple[CascadePlan, int]:
    """A plan of segments given as (rows, tokens), with pages in a scattered order, and the pages that it needs."""
    lengths = [[*level] for level in (*shared, leaf)]
    counts = [-(-kv_len // page_size) for level in lengths for _, kv_len in level]
    order = iter(torch.randperm(sum(counts), generator=torch.Generator().manual_seed(1)).tolist())
    levels = [
        make_level(
            [
                (
                    rows,
                    [next(order) for _ in range(-(-kv_len // page_size))],
                    (kv_len - 1) % page_size + 1 if kv_len else 0,
                )
                for rows, kv_len in level
            ]
        )
        for level in lengths
    ]
    plan = CascadePlan(tuple(levels), page_size, window_len)
    plan.check()
    return plan, sum(counts)


@pytest.mark.parametrize("sharing", [Sharing(num_threads=1), Sharing(num_threads=2), Sharing(num_threads=5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shared", "leaf", "window_len"), [load[1:] for load in LONG], ids=[load[0] for load in LONG])
def test_long_loads(
    shared: list[list[tuple[int, int]]],
    leaf: list[tuple[int, int]],
    window_len: int | None,
    dtype: torch.dtype,
    sharing: Sharing,
) -> None:
    """Several tiles of keys, blocks of rows and parts."""
    plan, num_pages = long_plan(shared, leaf, window_len, page_size=4)
    kv_cache = pool(num_pages, 4, 2, 64, dtype)
    backend = NativeAttentionBackend(spec_for(kv_cache, 3, dtype), kv_cache, sharing)
    assert_right(backend, plan, random_q(backend, plan.num_rows))


OFTEN = {(torch.bfloat16, 2), (torch.float32, 80), (torch.bfloat16, 256)}
"""Head sizes in `make test`: each dtype of each is a library that takes more than a second to compile."""
HEADS = [
    pytest.param(dtype, head_dim, marks=() if (dtype, head_dim) in OFTEN else pytest.mark.slow)
    for dtype in (torch.float32, torch.bfloat16)
    for head_dim in (2, 80, 256)
]


@pytest.mark.parametrize("group_size", [1, 5, 16, 100])
@pytest.mark.parametrize(("dtype", "head_dim"), HEADS)
def test_shapes(dtype: torch.dtype, head_dim: int, group_size: int) -> None:
    plan, num_pages = long_plan([[(5, 144)]], [(1, 20), (3, 140), (1, 1)], None, page_size=16)
    kv_cache = pool(num_pages, 16, 2, head_dim, dtype)
    backend = NativeAttentionBackend(spec_for(kv_cache, group_size, dtype), kv_cache, CUT_SMALL)
    assert_right(backend, plan, random_q(backend, 5))


def test_large_scores() -> None:
    plan, num_pages = long_plan([[(3, 320)]], [(1, 20), (1, 200), (1, 1)], None, page_size=16)
    kv_cache = pool(num_pages, 16, 2, 64, torch.float32)
    backend = NativeAttentionBackend(spec_for(kv_cache, 3, torch.float32), kv_cache, CUT_SMALL)
    q = 100 * random_q(backend, 3)
    out, lse = backend.prepare(plan).attend(0, q)
    expected_out, expected_lse = reference_attention(plan, kv_cache, 0, q, backend.spec.sm_scale)
    torch.testing.assert_close(out.double(), expected_out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-4)


def test_large_scores_end_at_the_soft_cap() -> None:
    plan, num_pages = long_plan([[(3, 320)]], [(1, 20), (1, 200), (1, 1)], None, page_size=16)
    kv_cache = pool(num_pages, 16, 2, 64, torch.float32)
    spec = replace(spec_for(kv_cache, 3, torch.float32), logits_soft_cap=50.0)
    backend = NativeAttentionBackend(spec, kv_cache, CUT_SMALL)
    assert_right(backend, plan, 1e6 * random_q(backend, 3))
    out, lse = backend.prepare(plan).attend(0, torch.full((3, 6, 64), torch.nan))
    assert out.isnan().all()
    assert lse.isnan().all()


@pytest.mark.parametrize("group_size", [2, 5, 16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_failed_keys_reach_their_own_sequence_only(dtype: torch.dtype, value: float, group_size: int) -> None:
    plan, num_pages = long_plan([[(3, 8)]], [(1, 3), (1, 200), (1, 4)], None, page_size=4)
    kv_cache = pool(num_pages, 4, 2, 8, dtype)
    k, v = torch.full((2, 1, 2, 8), value, dtype=dtype)
    for sharing in (CUT_SMALL, Sharing(num_threads=1)):
        backend = NativeAttentionBackend(spec_for(kv_cache, group_size, dtype), kv_cache, sharing)
        for token in (121, 198):  # what follows is packed where the last tile lay
            backend.write(0, k, v, torch.tensor([plan.leaf.pages(1)[token // 4] * 4 + token % 4]))
        out, lse = backend.prepare(plan).attend(0, random_q(backend, 3))
        assert (~out.isfinite()).flatten(1).any(1).tolist() == [False, True, False]
        assert (~lse.isfinite()).flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_failed_query_reaches_its_own_head_only(dtype: torch.dtype) -> None:
    plan, num_pages = long_plan([[(9, 64)]], [(1, 3), (3, 40), (5, 70)], None, page_size=4)
    kv_cache = pool(num_pages, 4, 2, 8, dtype)
    backend = NativeAttentionBackend(spec_for(kv_cache, 3, dtype), kv_cache)
    q = random_q(backend, 9)
    expected, _ = backend.prepare(plan).attend(0, q)
    q[4, 1] = torch.nan
    out, lse = backend.prepare(plan).attend(0, q)
    failed = torch.zeros(9, 6, dtype=torch.bool)
    failed[4, 1] = True
    assert torch.equal(out.isnan().all(-1), failed)
    assert torch.equal(lse.isnan(), failed)
    assert torch.equal(out[~failed], expected[~failed])


@pytest.mark.parametrize("kv_len", [1, 15, 16, 31, 32, 33, 63, 64, 65, 129])
@pytest.mark.parametrize("num_rows", [1, 5, 6, 11])
def test_ends_of_tiles(num_rows: int, kv_len: int) -> None:
    """Rounds of 3 to 33 queries, and keys that fill a tile, or leave one of it empty."""
    plan, num_pages = long_plan([[(num_rows, kv_len * 4)]], [(1, kv_len)] * num_rows, None, page_size=4)
    kv_cache = pool(num_pages, 4, 2, 40, torch.bfloat16)
    backend = NativeAttentionBackend(spec_for(kv_cache, 3, torch.bfloat16), kv_cache, Sharing(num_threads=1))
    assert_right(backend, plan, random_q(backend, num_rows))


def test_bfloat16_is_no_further_from_float64_than_the_twin() -> None:
    errors: dict[str, list[torch.Tensor]] = {"native": [], "torch": []}
    for seed in range(60):
        case = cascade_case(seed)
        native = backend_for(case, torch.bfloat16, seed)
        q = random_q(native, case.plan.num_rows, seed)
        expected, _ = reference_attention(case.plan, native.kv_cache, 0, q, native.spec.sm_scale)
        for name, backend in (("native", native), ("torch", TorchAttentionBackend(native.spec, native.kv_cache))):
            errors[name].append((backend.prepare(case.plan).attend(0, q)[0] - expected).flatten())
    rms = {name: torch.cat(parts).square().mean().sqrt().item() for name, parts in errors.items()}
    assert 0 < rms["native"] < 1.1 * rms["torch"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_wider_tensor_are_written_and_read_in_place(dtype: torch.dtype) -> None:
    plan, num_pages = long_plan([], [(7, 20)], None, page_size=4)
    native, twin = (pool(num_pages, 4, 2, 8, dtype) for _ in range(2))
    backend = NativeAttentionBackend(spec_for(native, 3, dtype), native)
    qkv = torch.randn(7, 10, 8, generator=torch.Generator().manual_seed(5)).to(dtype)
    slots = torch.tensor([plan.leaf.pages(0)[token // 4] * 4 + token % 4 for token in range(13, 20)])
    backend.write(0, qkv[:, 6:8], qkv[:, 8:], slots)
    twin.write(0, qkv[:, 6:8], qkv[:, 8:], slots)
    assert torch.equal(native.layer(0), twin.layer(0))
    assert_right(backend, plan, qkv[:, :6])
    assert_right(backend, plan, qkv[:, :6].transpose(1, 2).contiguous().transpose(1, 2))


@pytest.mark.parametrize("sharing", [Sharing(num_threads=1), CUT_SMALL])
def test_the_levels_shares_of_the_time_are_told_and_change_nothing(sharing: Sharing) -> None:
    def told(prepared: PreparedAttention) -> list[tuple[str, float]]:
        parts: list[tuple[str, float]] = []
        prepared.on_part = lambda part, share: parts.append((part, share))
        timed = prepared.attend(0, q)
        prepared.on_part = None
        assert all(torch.equal(a, b) for a, b in zip(timed, prepared.attend(0, q), strict=True))
        return parts

    plan, num_pages = long_plan([[(8, 64)], [(5, 32), (3, 0)]], [(1, 40)] * 8, None, page_size=4)
    kv_cache = pool(num_pages, 4, 2, 8, torch.float32)
    backend = NativeAttentionBackend(spec_for(kv_cache, 3, torch.float32), kv_cache, sharing)
    q = random_q(backend, plan.num_rows)
    (first, suffix), (second, rest) = told(backend.prepare(plan))
    assert (first, second, rest) == ("suffix attention", "shared attention", 1.0)
    assert 0 < suffix < 1
    assert told(backend.prepare(single_level_plan(plan))) == [("suffix attention", 1.0)]


def test_pools_that_it_does_not_read_are_refused_with_the_cure() -> None:
    kv_cache = pool(1, 4, 1, 8, torch.float32, layout="HND")
    with pytest.raises(BackendError, match="NHD"):
        NativeAttentionBackend(spec_for(kv_cache, 1, torch.float32), kv_cache)
    kv_cache = pool(1, 4, 1, 8, torch.float32)
    with pytest.raises(BackendError, match=r"bfloat16, not torch\.float32"):
        NativeAttentionBackend(spec_for(kv_cache, 1, torch.bfloat16), kv_cache)
