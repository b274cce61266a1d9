"""All levels of a decode step in one launch: which steps are served, that they are right, limits, a whole engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.fused import FusedLevels, fused_workspace_bytes
from cascade_llm.attention.flashinfer.levels import FlashInferDevice
from cascade_llm.attention.flashinfer.table import KernelTable
from cascade_llm.attention.reference import reference_attention
from cascade_llm.errors import BackendError, CapacityError
from cascade_llm.kv_cache.paged_kv_cache import KVScale, PagedKVCache
from cascade_llm.plan import CascadePlan
from cascade_llm.validation.cases import CaseChoices, cascade_case
from tests.cascade_cases import CascadeCase, make_level, pool_with_only
from tests.doubles.planner import DoubleError
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of
from tests.gpu_path.test_engine_on_double import GREEDY, VOCAB, tokens
from tests.gpu_path.test_flashinfer_backend import (
    assert_equals_reference,
    backend_of,
    case_of,
    decode_case,
    random_q,
    spec_of,
)

FUSED = KernelTable(shared="prefill_fa2", decode_leaf="decode_tensor_cores", row_leaf="prefill_fa2", fused_levels=True)
SHARED_DECODE = CaseChoices(decode=True, window=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **SHAPE)


def decode_case_of(seed: int, head_dim: int = 64) -> CascadeCase:
    return replace(cascade_case(seed, SHARED_DECODE), head_dim=head_dim)


def shares(plan: CascadePlan) -> bool:
    return any(len(level.kv_page_indices) for level in plan.shared_levels)


@pytest.mark.parametrize("seed", range(40))
def test_equals_dense_attention(seed: int) -> None:
    """Several groups and levels, empty segments; steps that share nothing go the ordinary way."""
    case = decode_case_of(seed)
    pool = pool_with_only(case, num_layers=2, dtype=torch.float32, seed=seed)
    backend, double = backend_of(case, pool, num_sm=(1, 2, 132)[seed % 3], kernels=FUSED)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, torch.float32))
    assert ("batch_attention" in {variant[0] for variant in double._variants}) == shares(case.plan)
    if shares(case.plan):
        assert (double.num_plans, double.num_runs) == (1, 2)


@pytest.mark.parametrize("seed", range(40, 46))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_dense_attention_in_16_bits(seed: int, dtype: torch.dtype) -> None:
    case = decode_case_of(seed, 128)
    pool = pool_with_only(case, num_layers=1, dtype=dtype, seed=seed)
    backend, _ = backend_of(case, pool, dtype=dtype, kernels=FUSED)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, dtype))


def test_long_prefixes_are_split() -> None:
    case = decode_case([700, 3, 130, 16], 90)
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=1)
    backend, _ = backend_of(case, pool, num_sm=8, kernels=FUSED)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, torch.float32))


@pytest.mark.parametrize("seed", range(12))
def test_steps_with_several_rows_go_the_ordinary_way(seed: int) -> None:
    case = case_of(seed)
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=seed)
    backend, double = backend_of(case, pool, kernels=FUSED)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, torch.float32))
    decodes = case.plan.num_rows == case.plan.leaf.num_segments
    assert ("batch_attention" in {variant[0] for variant in double._variants}) == (decodes and shares(case.plan))


def test_plans_of_growing_sequences_follow_each_other() -> None:
    """Lengths are in the plan; page indices are in memory that is used again, and grows."""
    double, pool, backend, q = None, None, None, None
    for kv_lens in ([5, 17], [6, 18], [100, 200], [7, 3]):
        case = decode_case(kv_lens, 2)
        if backend is None:
            largest = decode_case([100, 200], 2)
            pool = pool_with_only(largest, num_layers=1, dtype=torch.float32, seed=2)
            pool.layer(0).normal_()
            backend, double = backend_of(largest, pool, kernels=FUSED)
            q = random_q(case, torch.float32)
        assert pool is not None
        assert q is not None
        assert_equals_reference(backend, case, case.plan, pool, q)
    assert double is not None
    assert double.num_plans == 4


def test_scales_of_pages_of_8_bits_are_applied_in_the_kernel_once() -> None:
    case = decode_case_of(3, 128)
    assert shares(case.plan)
    pool = PagedKVCache(
        num_layers=2,
        num_pages=case.num_pages,
        page_size=case.plan.page_size,
        num_kv_heads=case.num_kv_heads,
        head_dim=128,
        dtype=torch.float8_e4m3fn,
        scales=[KVScale(0.5, 3.0), KVScale(0.03, 0.25)],
    )
    generator = torch.Generator().manual_seed(1)
    for layer in range(2):
        k, v = torch.randn(2, pool.num_slots, case.num_kv_heads, 128, generator=generator)
        pool.write(layer, k, v, torch.arange(pool.num_slots))
    spec = replace(spec_of(case, torch.float32), kv_dtype=torch.float8_e4m3fn)
    backend = FlashInferAttentionBackend(spec, pool, double_gpu().platform(), FUSED)
    q, prepared = random_q(case, torch.float32), backend.prepare(case.plan)
    for layer in range(2):
        out, lse = prepared.attend(layer, q)
        expected, expected_lse = reference_attention(case.plan, pool, layer, q, spec.sm_scale)
        torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(lse.double(), expected_lse, atol=1e-4, rtol=1e-4)


# -- limits -----------------------------------------------------------------------------------------------------------


def fused_of(spec: AttentionSpec, pool: PagedKVCache, num_sm: int = 132) -> FusedLevels:
    double = double_gpu(num_sm=num_sm)
    return FusedLevels(FlashInferDevice.create(double.ops(), double.stream), spec, pool, num_sm)


def pool_of(spec: AttentionSpec, num_pages: int, device: str = "cpu") -> PagedKVCache:
    return PagedKVCache(
        num_layers=1,
        num_pages=num_pages,
        page_size=16,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        device=device,
    )


def heads(num_qo_heads: int, num_kv_heads: int) -> AttentionSpec:
    spec = spec_of(decode_case([1], 0), torch.bfloat16)
    return replace(spec, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim=128)


@pytest.mark.parametrize(("num_kv_heads", "enlarged"), [(8, False), (10, False), (11, True), (16, True)])
def test_the_workspace_is_enlarged_where_the_kernels_own_is_too_small(
    num_kv_heads: int, enlarged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """132 processors, heads of 128: 384 MiB hold the splits of up to ten KV heads."""
    spec = heads(num_kv_heads, num_kv_heads)
    assert (fused_workspace_bytes(spec, 132) > 384 << 20) == enlarged
    case = decode_case([5, 17], 2)
    pool = pool_of(spec, case.num_pages)
    fused_of(spec, pool).prepare(case.plan)
    monkeypatch.setattr(FusedLevels, "_enlarge_workspace", lambda self: None)
    bare = fused_of(spec, pool)
    if enlarged:
        with pytest.raises(DoubleError, match="holistic_partial_o"):
            bare.prepare(case.plan)
    else:
        bare.prepare(case.plan)


def test_a_workspace_that_memory_has_no_room_for_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = heads(16, 16)
    pool, empty = pool_of(spec, 4), torch.empty

    def taken(*shape: int, **options: object) -> torch.Tensor:
        if shape[0] == fused_workspace_bytes(spec, 132):
            raise torch.OutOfMemoryError("no memory")
        return empty(*shape, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "empty", taken)
    with pytest.raises(CapacityError, match=r"gpu_memory_utilization.*fused_levels"):
        fused_of(spec, pool)


def test_a_pool_beyond_32_bits_is_refused_by_name() -> None:
    spec = heads(32, 8)
    largest = (1 << 32) // (16 * 8 * 128)
    fused_of(spec, pool_of(spec, largest, "meta"))
    with pytest.raises(BackendError, match=r"BatchAttention.*4,194,304 tokens"):
        fused_of(spec, pool_of(spec, largest + 1, "meta"))


def test_what_is_not_a_decode_step_that_shares_is_not_served() -> None:
    spec = heads(4, 2)
    fused = fused_of(spec, pool_of(spec, 64))
    case = decode_case([5, 17], 2)
    assert fused.serves(case.plan)
    assert not fused.serves(CascadePlan(case.plan.levels, 16, window_len=8))
    assert not fused.serves(decode_case([5, 17], 0).plan)
    assert not fused.serves(CascadePlan((make_level([(2, [], 0)]), case.plan.leaf), 16))
    rows = make_level([(2, [0], 16)]), make_level([(2, [1], 2)])
    assert not fused.serves(CascadePlan(rows, 16))


def test_more_works_than_a_plan_holds_are_not_served() -> None:
    spec = heads(32, 32)
    fused = fused_of(spec, pool_of(spec, 4))
    for num_sequences, served in ((1700, True), (2100, False)):
        leaf = make_level([(1, [1], 1)] * num_sequences)
        assert fused.serves(CascadePlan((make_level([(num_sequences, [0], 16)]), leaf), 16)) == served


# -- a whole engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_an_eager_engine_equals_the_torch_backend(tiny: Path, seed: int) -> None:
    prompts = random_forest(seed, 12, VOCAB, 60)
    with tiny_llm(tiny, cascade_max_levels=4) as twin:
        expected = tokens(twin.generate(prompts, GREEDY))
    double = double_gpu()
    with gpu_llm(tiny, double, FUSED, cascade_max_levels=4, enforce_eager=True) as llm:
        assert tokens(llm.generate(prompts, GREEDY)) == expected
    assert "batch_attention" in {variant[0] for variant in double._variants}


def test_graphs_go_the_ordinary_way(tiny: Path) -> None:
    prompts = random_forest(4, 8, VOCAB, 40)
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(prompts, GREEDY))
    double = double_gpu()
    with gpu_llm(tiny, double, FUSED) as llm:
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        assert graphs_of(llm).counters.graph_steps > 0
