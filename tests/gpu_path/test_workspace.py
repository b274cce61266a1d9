"""The float workspace holds every plan of an engine: by planning alone, for the head layouts of real models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.levels import LevelBuffers, LevelColumns, LevelKernel
from cascade_llm.attention.flashinfer.workspace import float_workspace_bytes, leaf_splits, shared_level_splits
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.tiling import graph_tile, max_tiles, num_tiles
from cascade_llm.worker.graph_shapes import GraphShape, graph_shapes
from tests.cascade_cases import make_level
from tests.gpu_path.gpu_engine import double_gpu

MIB = 1 << 20
NUM_PROCESSORS = 132
HEADS = {
    "Llama-2-7B": (32, 32),
    "Llama-3-8B": (32, 8),
    "Llama-3-70B": (64, 8),
    "Qwen3-0.6B": (16, 8),
    "Qwen3-32B": (64, 8),
    "13B": (40, 40),
}
ROWS = (256, 512, 1024)
MAX_SHARED = 3


def spec_of(model: str) -> AttentionSpec:
    num_qo_heads, num_kv_heads = HEADS[model]
    return AttentionSpec(
        num_layers=1,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=128,
        sm_scale=1.0,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )


def shapes_of(spec: AttentionSpec, max_rows: int) -> list[GraphShape]:
    return graph_shapes(max_rows, spec.group_size, MAX_SHARED)


def levels_of(shapes: list[GraphShape]) -> Iterator[tuple[int, int]]:
    """(rows, segments) of the shared levels that are captured, each once."""
    yield from {(shape.rows, capacity): None for shape in shapes for capacity in shape.capacities}


@pytest.mark.parametrize("max_rows", ROWS)
@pytest.mark.parametrize("model", HEADS)
def test_every_captured_level_is_planned(model: str, max_rows: int) -> None:
    """The double plans by FlashInfer's arithmetic, and raises as FlashInfer does where the workspace is too small."""
    spec = spec_of(model)
    shapes = shapes_of(spec, max_rows)
    pool = PagedKVCache(
        num_layers=1,
        num_pages=1,
        page_size=16,
        num_kv_heads=spec.num_kv_heads,
        head_dim=128,
        dtype=spec.dtype,
        device=spec.device,
    )
    double = double_gpu(num_sm=NUM_PROCESSORS, exact=False)
    backend = FlashInferAttentionBackend(spec, pool, double.platform(), graph_shapes=shapes)
    common = backend.device, spec, 16
    stream = double.stream

    def pinned(values: list[int]) -> torch.Tensor:
        return stream.pinned(len(values), torch.int32).copy_(torch.tensor(values, dtype=torch.int32))

    def buffers(segments: int) -> LevelBuffers:
        return LevelBuffers(*(torch.zeros(n, dtype=torch.int32) for n in (segments + 1, segments + 1, 1, segments)))

    def plan(kernel: LevelKernel, qo_indptr: list[int], kv_page_indptr: list[int], last: list[int]) -> None:
        no_pages = torch.empty(0, dtype=torch.int32)
        kernel.plan(LevelColumns(pinned(qo_indptr), pinned(kv_page_indptr), no_pages, pinned(last)))

    for rows, segments in levels_of(shapes):
        splits = shared_level_splits(rows, segments, spec, NUM_PROCESSORS)
        kernel = LevelKernel(*common, "prefill_fa2", buffers=buffers(segments), split_kv=splits)
        plan(kernel, [0] + [rows] * segments, [0] + [1] * segments, [16] + [0] * (segments - 1))
    for rows in {shape.rows for shape in shapes}:
        splits = leaf_splits(rows, spec, NUM_PROCESSORS)
        kernel = LevelKernel(*common, backend.decode_leaf, buffers=buffers(rows), split_kv=splits)
        plan(kernel, list(range(rows + 1)), list(range(rows + 1)), [16] * rows)


@pytest.mark.parametrize("model", HEADS)
def test_it_is_no_larger_than_a_level_may_take(model: str) -> None:
    spec = spec_of(model)
    assert float_workspace_bytes(spec, NUM_PROCESSORS, shapes_of(spec, 1024)) <= 256 * MIB
    assert 15 * MIB < float_workspace_bytes(spec, NUM_PROCESSORS) < 18 * MIB, "eager steps alone"


@pytest.mark.parametrize(
    ("model", "rows", "mebibytes"),
    [("Llama-2-7B", 256, 245), ("Qwen3-0.6B", 512, 131), ("Llama-3-8B", 512, 136), ("13B", 128, 142)],
)
def test_the_figures_of_the_source(model: str, rows: int, mebibytes: int) -> None:
    """Worked out from FlashInfer's scheduler by hand, for the narrow level of that many rows."""
    spec = spec_of(model)
    shape = max(shapes_of(spec, rows), key=lambda shape: (shape.rows, shape.capacities))
    assert round(float_workspace_bytes(spec, NUM_PROCESSORS, [shape]) / MIB) == mebibytes


@pytest.mark.parametrize("model", HEADS)
def test_levels_that_are_not_cut_for_their_size_fill_half_of_the_device_without(model: str) -> None:
    spec = spec_of(model)
    most = max_tiles(NUM_PROCESSORS, spec.num_kv_heads)
    for rows, segments in levels_of(shapes_of(spec, 1024)):
        if not shared_level_splits(rows, segments, spec, NUM_PROCESSORS):
            tile = graph_tile(rows, segments, spec.group_size)
            assert 2 * num_tiles(rows, spec.group_size, tile) >= most


@pytest.mark.parametrize("model", HEADS)
def test_every_eager_step_is_planned(model: str) -> None:
    """A few rows on long pages are cut most; many rows are not cut at all."""
    spec = spec_of(model)
    pool = PagedKVCache(
        num_layers=1,
        num_pages=1,
        page_size=16,
        num_kv_heads=spec.num_kv_heads,
        head_dim=128,
        dtype=spec.dtype,
        device=spec.device,
    )
    backend = FlashInferAttentionBackend(spec, pool, double_gpu(num_sm=NUM_PROCESSORS, exact=False).platform())
    for rows, segments in ((1, 1), (16, 1), (70, 1), (128, 2), (300, 3), (2048, 1), (4096, 200)):
        level = make_level([(rows, range(4000), 16)] + [(1, range(40), 16)] * (segments - 1))
        for kernel in ("prefill_fa2", backend.decode_leaf):
            if kernel == "prefill_fa2" or rows == 1:
                LevelKernel(backend.device, spec, 16, kernel).plan(backend.columns(level, segments))
