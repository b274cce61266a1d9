"""Shared levels on fa3 in chunks: how they are cut, that they are right, and that a whole engine runs on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import SamplingParams
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend, level_columns
from cascade_llm.attention.flashinfer.chunks import ChunkedLevelKernel, cut_level
from cascade_llm.attention.flashinfer.graph import SharedColumns
from cascade_llm.attention.flashinfer.levels import LevelColumns, LevelKernel, LevelOutput
from cascade_llm.attention.flashinfer.table import ChunkRule, KernelTable
from cascade_llm.attention.reference import reference_attention
from cascade_llm.errors import BackendError
from cascade_llm.plan import CascadePlan
from tests.cascade_cases import CascadeCase, make_level, pool_with_only
from tests.doubles.device import DoubleStream
from tests.doubles.flashinfer import FlashInferDouble
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

EAGER_TO_CUT = ChunkRule(min_packed_rows=1, min_tokens=1, chunk_tokens=3, max_chunks=5)
CHUNKS = KernelTable(
    shared="prefill_fa3_chunks", decode_leaf="decode_tensor_cores", row_leaf="prefill_fa2", chunks=EAGER_TO_CUT
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **SHAPE)


# -- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiles", "longest", "chunks"),
    [
        (64, None, 2),  # 128 of 132 processors; three chunks would take two rounds of a third
        (16, None, 8),
        (8, None, 15),  # 120 processors with a fifteenth each
        (1024, None, 1),
        (8, 2048, 4),
        (8, 100, 1),
    ],
)
def test_chunks_fill_the_device(tiles: int, longest: int | None, chunks: int) -> None:
    assert ChunkRule().num_chunks(tiles, 132, longest) == chunks


def test_large_segments_alone_are_taken() -> None:
    rule = ChunkRule()
    assert rule.takes(17, 2048, 4)
    assert not rule.takes(16, 2048, 4)
    assert not rule.takes(17, 2047, 4)
    assert rule.takes_level([(64, 4096), (4, 4096)], 4)
    assert not rule.takes_level([(64, 4096), (16, 32768)], 4)
    assert not rule.takes_level([(64, 0)], 4)
    assert rule.takes_shape(64, 8, 4)
    assert not rule.takes_shape(64, 60, 4)


def test_fa3_and_pages_of_8_bits_are_refused_by_name() -> None:
    case = decode_case([20, 30], 4)
    spec = replace(spec_of(case, torch.bfloat16), kv_dtype=torch.float8_e4m3fn)
    for shared in ("prefill_fa3", "prefill_fa3_chunks"):
        reasons = replace(CHUNKS, shared=shared).reasons_against(spec)  # type: ignore[arg-type]
        assert len(reasons) == 1
        assert shared in reasons[0]
        assert "kv_cache_dtype" in reasons[0]
    assert CHUNKS.reasons_against(spec_of(case, torch.bfloat16)) == []
    assert KernelTable.for_model(spec).reasons_against(spec) == []
    assert KernelTable.of_all_kernels(spec, "9.0a").reasons_against(spec) == []
    wide = spec_of(case, torch.bfloat16)
    assert [KernelTable.of_all_kernels(wide, arch).shared for arch in ("9.0a", "8.0")] == [
        "prefill_fa3_chunks",
        "prefill_fa2",
    ]
    pool = pool_with_only(replace(case, head_dim=128), num_layers=1, dtype=torch.bfloat16, seed=0)
    with pytest.raises(BackendError, match=r"fa3 reads float8_e4m3fn pages"):
        FlashInferAttentionBackend(
            replace(spec, head_dim=128, kv_dtype=torch.float8_e4m3fn),
            _with_dtype(pool),
            double_gpu().platform(),
            CHUNKS,
        )


def _with_dtype(pool: Any) -> Any:
    pool.dtype = torch.float8_e4m3fn
    return pool


def test_the_double_refuses_fa3_on_pages_of_8_bits() -> None:
    double = double_gpu()
    workspace = torch.empty(64, dtype=torch.uint8)
    wrapper = double.ops().BatchPrefillWithPagedKVCacheWrapper(workspace, backend="fa3")
    columns = [torch.tensor(values).int() for values in ([0, 2], [0, 1], [0], [16])]
    with pytest.raises(DoubleError, match="FP8 queries"):
        wrapper.plan(*columns, 2, 2, 128, 16, q_data_type=torch.bfloat16, kv_data_type=torch.float8_e4m3fn)


# -- cutting ----------------------------------------------------------------------------------------------------------


def test_chunks_are_requests_in_chunk_order() -> None:
    level = make_level([(3, [4, 5, 6, 7, 8], 2), (2, [], 0), (1, [9], 2)])
    rule = ChunkRule(chunk_tokens=4)
    cut = cut_level(level_columns(level, 3), [10, 0, 2], 2, 2, 3, rule)
    # 10 tokens make two chunks of at least 4; the third chunk of all segments is empty
    assert cut.qo_indptr.tolist() == [0, 6, 10, 12, 18, 22, 24, 30, 34, 36]
    assert cut.kv_page_indptr.tolist() == [0, 2, 2, 3, 6, 6, 6, 6, 6, 6]
    assert cut.kv_page_indices.tolist() == [4, 5, 9, 6, 7, 8]
    assert cut.kv_last_page_len.tolist() == [2, 0, 2, 2, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("seed", range(20))
def test_every_page_is_in_one_chunk_of_its_segment(seed: int) -> None:
    case = case_of(seed)
    for level in case.plan.shared_levels:
        columns = level_columns(level, level.num_segments)
        lengths = [level.kv_len(i, case.plan.page_size) for i in range(level.num_segments)]
        cut = cut_level(columns, lengths, case.plan.page_size, case.group_size, 5, EAGER_TO_CUT)
        indptr, indices = cut.kv_page_indptr.tolist(), cut.kv_page_indices.tolist()
        for segment in range(level.num_segments):
            met = [
                page
                for chunk in range(5)
                for page in indices[
                    indptr[chunk * level.num_segments + segment] : indptr[chunk * level.num_segments + segment + 1]
                ]
            ]
            assert met == level.pages(segment).tolist()
        pages = cut.kv_page_indptr.diff()
        assert ((cut.kv_last_page_len == 0) == (pages == 0)).all()


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_equals_dense_attention(seed: int) -> None:
    """Several groups and levels, prefill and mixed steps, empty segments; the chunks' number follows the device."""
    case = case_of(seed)
    pool = pool_with_only(case, num_layers=2, dtype=torch.float32, seed=seed)
    backend, _ = backend_of(case, pool, num_sm=(2, 9, 132)[seed % 3], kernels=CHUNKS)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, torch.float32))


@pytest.mark.parametrize("seed", range(40, 46))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equals_dense_attention_in_16_bits(seed: int, dtype: torch.dtype) -> None:
    case = replace(case_of(seed), head_dim=128)
    pool = pool_with_only(case, num_layers=1, dtype=dtype, seed=seed)
    backend, _ = backend_of(case, pool, dtype=dtype, kernels=CHUNKS)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, dtype))


@pytest.mark.parametrize("shared", ["prefill_fa3", "prefill_fa3_chunks"])
def test_a_level_of_large_segments_is_cut_and_others_are_not(shared: str) -> None:
    """By the table's own figures: 20 rows of 4 packed on 2048 tokens; the second level's segments have 2 rows."""
    case = decode_case([20] * 20, 128)
    kernels = replace(CHUNKS, shared=shared, chunks=ChunkRule())  # type: ignore[arg-type]
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=1)
    backend, double = backend_of(case, pool, kernels=kernels)
    assert_equals_reference(backend, case, case.plan, pool, random_q(case, torch.float32))
    kernel = backend._shared[0]._kernel
    if shared == "prefill_fa3":
        assert isinstance(kernel, LevelKernel)
    else:
        assert isinstance(kernel, ChunkedLevelKernel)
        assert kernel.num_chunks == 4
    assert any("prefill_fa3" in variant for variant in double._variants)
    small = decode_case([20] * 4, 128)
    backend, double = backend_of(small, pool, kernels=kernels)
    assert_equals_reference(backend, small, small.plan, pool, random_q(small, torch.float32))
    assert any("prefill_fa3" in variant for variant in double._variants) == (shared == "prefill_fa3")


def test_a_cut_level_is_planned_once_for_as_long_as_it_is_the_same_object() -> None:
    case = decode_case([20, 30, 40], 4)
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=4)
    backend, double = backend_of(case, pool, kernels=CHUNKS)
    q = random_q(case, torch.float32)
    for plans in (2, 3):
        assert_equals_reference(backend, case, case.plan, pool, q)
        assert double.num_plans == plans


# -- graphs -----------------------------------------------------------------------------------------------------------


def graph_kernel(case: CascadeCase, rows: int, segments: int) -> tuple[ChunkedLevelKernel, SharedColumns, DoubleStream]:
    pool = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=1)
    backend, double = backend_of(case, pool, num_sm=16, kernels=CHUNKS)
    columns = SharedColumns(segments, pool.num_pages, torch.device("cpu"))
    kernel = ChunkedLevelKernel(
        backend.device, backend.spec, 16, EAGER_TO_CUT, 16, rows=rows, buffers=columns.first(segments)
    )
    return kernel, columns, double.stream


def plan_on(kernel: ChunkedLevelKernel, columns: SharedColumns, stream: DoubleStream, *, pages: list[int]) -> None:
    def pinned(values: list[int]) -> torch.Tensor:
        return stream.pinned(len(values), torch.int32).copy_(torch.tensor(values))

    level = LevelColumns(pinned([0, 3, 3]), pinned([0, len(pages), len(pages)]), pinned(pages), pinned([16, 0]))
    arranged = kernel.arrange(level)
    indices = columns.first(2).kv_page_indices
    stream.copy(indices[: len(pages)], arranged.kv_page_indices)
    kernel.plan(arranged._replace(kv_page_indices=indices[:0]))


def test_a_captured_level_follows_its_plans() -> None:
    case = decode_case([20, 30, 40], 6)
    kernel, columns, stream = graph_kernel(case, 3, 2)
    assert kernel.num_chunks > 2
    pool, q = pool_with_only(case, num_layers=1, dtype=torch.float32, seed=1), random_q(case, torch.float32)
    k, v = pool.layer(0)
    result = LevelOutput.empty(3, spec_of(case, torch.float32))
    seen: list[LevelOutput] = []

    def work() -> None:
        found = kernel.run(q, (k, v), result)
        result.out.copy_(found.out)
        result.lse.copy_(found.lse)
        seen.append(found)

    with stream.active():
        plan_on(kernel, columns, stream, pages=[0, 1])
        work()
        graph = stream.capture(work)
        for pages in ([0, 1, 2, 3, 4, 5], [4], [2, 0, 1]):
            plan_on(kernel, columns, stream, pages=pages)
            graph.replay()
            stream.mark().wait()
            plan = CascadePlan((make_level([(1, pages, 16)] * 3),), 16)
            out, lse = reference_attention(plan, pool, 0, q, 64**-0.5)
            torch.testing.assert_close(result.out.double(), out, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(result.lse.double(), lse, atol=1e-5, rtol=1e-5)
    assert seen[0].out.shape == q.shape


@pytest.mark.parametrize("waits", [True, False])
def test_pinned_columns_are_not_written_while_their_copy_is_in_flight(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = decode_case([20, 30, 40], 6)
    kernel, columns, stream = graph_kernel(case, 3, 2)
    if not waits:
        monkeypatch.setattr(LevelKernel, "wait_for_plan", lambda self: None)
    with stream.active():
        plan_on(kernel, columns, stream, pages=[0, 1])
        if waits:
            plan_on(kernel, columns, stream, pages=[3])
        else:
            with pytest.raises(DoubleError, match="in flight"):
                plan_on(kernel, columns, stream, pages=[3])


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("seed", range(3))
def test_an_engine_equals_the_torch_backend(tiny: Path, seed: int, enforce_eager: bool) -> None:
    options: dict[str, Any] = {"cascade_max_levels": 4, "max_num_seqs": 12}
    prompts = random_forest(seed, 14, VOCAB, 60)
    params = [SamplingParams(temperature=0, max_tokens=3 + i % 9, ignore_eos=True) for i in range(len(prompts))]
    with tiny_llm(tiny, **options) as twin:
        expected = tokens(twin.generate(prompts, params))
    double = double_gpu(num_sm=16)
    with gpu_llm(tiny, double, CHUNKS, enforce_eager=enforce_eager, **options) as llm:
        assert tokens(llm.generate(prompts, params)) == expected
        assert llm.stats()["cascade_steps"] > 0
        if not enforce_eager:
            assert graphs_of(llm).counters.graph_steps > 0
    used = {variant[0] for variant in double._variants}
    assert {"prefill_fa3", "merge_states"} <= used


def test_levels_that_are_captured_for_small_segments_stay_whole(tiny: Path) -> None:
    """12 rows of 2 packed: levels of 2 segments are captured for 22 of them in one, those of 4 for 18."""
    kernels = replace(CHUNKS, chunks=replace(EAGER_TO_CUT, min_packed_rows=20))
    prompts = random_forest(2, 14, VOCAB, 60)
    with tiny_llm(tiny, max_num_seqs=12) as twin:
        expected = tokens(twin.generate(prompts, GREEDY))
    with gpu_llm(tiny, double_gpu(num_sm=16), kernels, max_num_seqs=12) as llm:
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        captured = [(shape, x.attention._shared) for shape, x in graphs_of(llm)._shapes.items() if shape.rows == 12]
    kinds = {c: type(x.kernel) for shape, xs in captured for c, x in zip(shape.capacities, xs, strict=True)}
    assert kinds == {2: ChunkedLevelKernel, 4: LevelKernel}


def test_an_engine_on_fa3_without_chunks_runs_in_graphs(tiny: Path) -> None:
    """fa3 cannot say how much plan memory it needs."""
    prompts = random_forest(3, 10, VOCAB, 60)
    with tiny_llm(tiny) as twin:
        expected = tokens(twin.generate(prompts, GREEDY))
    with gpu_llm(tiny, double_gpu(), replace(CHUNKS, shared="prefill_fa3")) as llm:
        assert tokens(llm.generate(prompts, GREEDY)) == expected
        assert graphs_of(llm).counters.graph_steps > 0


def test_sixteen_bits_run_by_the_strict_rules(tiny: Path) -> None:
    prompts = random_forest(5, 6, VOCAB, 40)
    double: FlashInferDouble = double_gpu(exact=False)
    with gpu_llm(tiny, double, CHUNKS, dtype="bfloat16") as llm:
        outputs = llm.generate(prompts, GREEDY)
        assert graphs_of(llm).counters.graph_steps > 0
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12] * 6
