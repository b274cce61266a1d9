"""Pages of 8 bits: the same attention over K and V that were rounded to 8 bits, and to nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade_llm import SamplingParams
from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.reference import reference_attention
from cascade_llm.attention.select import select_backend
from cascade_llm.errors import BackendError, CheckpointError
from cascade_llm.kv_cache.paged_kv_cache import KVScale, PagedKVCache
from cascade_llm.models.loading import KVScaleReader
from cascade_llm.plan import PageCopy
from cascade_llm.weights.format import StoredTensor
from tests.cascade_cases import CascadeCase, cascade_case
from tests.doubles.device import DoubleStream
from tests.doubles.flashinfer import FlashInferDouble
from tests.doubles.planner import DoubleError
from tests.engine.tiny_llm import random_forest, save_tiny
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of

FP8 = torch.float8_e4m3fn
SCALES = [KVScale(0.5, 3.0), KVScale(0.03, 0.25)]


def spec_of(case: CascadeCase, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(
        num_layers=2,
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        sm_scale=case.head_dim**-0.5,
        dtype=dtype,
        device=torch.device("cpu"),
        kv_dtype=FP8,
    )


def pool_of(case: CascadeCase) -> PagedKVCache:
    return PagedKVCache(
        num_layers=2,
        num_pages=case.num_pages,
        page_size=case.plan.page_size,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=FP8,
        scales=SCALES,
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_dense_attention_over_rounded_pages(seed: int, dtype: torch.dtype) -> None:
    """Written through FlashInfer's append; the reference rounds the same numbers by itself."""
    case = replace(cascade_case(seed), head_dim=128)
    pool, generator = pool_of(case), torch.Generator().manual_seed(seed)
    double = FlashInferDouble(DoubleStream(), exact=dtype == torch.float32)
    backend = FlashInferAttentionBackend(spec_of(case, dtype), pool, double.platform())
    exact = PagedKVCache(
        num_layers=2,
        num_pages=case.num_pages,
        page_size=case.plan.page_size,
        num_kv_heads=case.num_kv_heads,
        head_dim=128,
        dtype=torch.float32,
    )
    slots = torch.arange(pool.num_slots, dtype=torch.int32)
    for layer, scale in enumerate(SCALES):
        k, v = torch.randn(2, len(slots), case.num_kv_heads, 128, generator=generator).to(dtype)
        k[0, 0, 0] = 1e4  # beyond the largest number of 8 bits
        backend.write(layer, k, v, slots)
        rounded = [((x.float() / s).clamp(-448, 448).to(FP8).float() * s) for x, s in zip((k, v), scale, strict=True)]
        exact.write(layer, *rounded, slots.long())
    prepared = backend.prepare(case.plan)
    q = torch.randn(case.plan.num_rows, case.num_qo_heads, 128, generator=generator).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for layer in range(2):
        out, lse = prepared.attend(layer, q)
        expected_out, expected_lse = reference_attention(case.plan, exact, layer, q, case.head_dim**-0.5)
        torch.testing.assert_close(out.double(), expected_out, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse.double(), expected_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_the_pool_rounds_clamps_and_copies(layout: str) -> None:
    pool = PagedKVCache(
        num_layers=1,
        num_pages=3,
        page_size=2,
        num_kv_heads=1,
        head_dim=4,
        dtype=FP8,
        layout=layout,  # type: ignore[arg-type]
        scales=[KVScale(2.0, 1.0)],
    )
    assert pool.num_bytes == 2 * 3 * 2 * 4
    k, v = torch.tensor([[[1.0, -2000.0, 3.3, 0.0]]]), torch.tensor([[[0.1, 500.0, -1.0, 7.0]]])
    pool.write(0, k, v, torch.tensor([3]))
    pool.copy_pages([PageCopy(1, 2)])
    read_k, read_v = pool.read(0, torch.tensor([5]))
    assert read_k.tolist() == [[[1.0, -896.0, 3.25, 0.0]]]
    assert read_v.tolist() == [[[0.1015625, 448.0, -1.0, 7.0]]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **{**SHAPE, "head_dim": 128})


def test_the_engine_serves_from_half_the_bytes(tiny: Path) -> None:
    prompts = random_forest(3, 8, 90, 50)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    found = []
    for eager in (False, True):
        with gpu_llm(tiny, double_gpu(), kv_cache_dtype="fp8_e4m3", enforce_eager=eager) as llm:
            found.append([output["token_ids"] for output in llm.generate(prompts, params)])
            assert llm.facts.kv_bytes_per_token == 2 * 2 * 2 * 128
            stats = llm.stats()
            assert stats["kv_bytes_read"] % llm.facts.kv_bytes_per_token == 0
            assert stats["cascade_steps"] > 0
            if not eager:
                assert graphs_of(llm).counters.graph_steps > 0
    assert found[0] == found[1]


def test_head_dim_64_is_refused(tiny: Path) -> None:
    case = replace(cascade_case(1), head_dim=64)
    with pytest.raises(BackendError, match=r"FP8 pages.*head_dim 64"):
        select_backend("flashinfer", spec_of(case, torch.bfloat16))


def test_a_dtype_that_append_would_reinterpret_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(cascade_case(1), head_dim=128)
    backend = FlashInferAttentionBackend(
        spec_of(case, torch.bfloat16), pool_of(case), FlashInferDouble(DoubleStream()).platform()
    )
    monkeypatch.setattr(PagedKVCache, "encode", lambda self, x, scale: x)
    k = torch.zeros(1, case.num_kv_heads, 128, dtype=torch.bfloat16)
    with pytest.raises(DoubleError, match="reinterprets"):
        backend.write(0, k, k, torch.zeros(1, dtype=torch.int32))


def test_scales_are_taken_from_the_checkpoint() -> None:
    one = StoredTensor.plain(torch.tensor(1.0))
    tensors = [
        ("model.layers.0.self_attn.k_scale", StoredTensor.plain(torch.tensor([0.5]))),
        ("model.layers.1.self_attn.attn.v_scale", StoredTensor.plain(torch.tensor(2.0))),
        ("model.norm.weight", one),
        ("model.layers.7.self_attn.k_scale", one),
    ]
    reader = KVScaleReader(2)
    assert [name for name, _ in reader.without_scales(tensors)] == [tensors[2][0], tensors[3][0]]
    assert reader.scales() == [KVScale(0.5, 1.0), KVScale(1.0, 2.0)]
    for wrong in (torch.tensor(0.0), torch.tensor([1.0, 2.0]), torch.tensor(torch.inf)):
        with pytest.raises(CheckpointError, match="k_scale must be one positive number"):
            list(reader.without_scales([("model.layers.0.self_attn.k_scale", StoredTensor.plain(wrong))]))
