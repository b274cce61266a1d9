"""Rules of the kernels that a table selects for measuring, broken on purpose: the run must then fail or differ.

As in `test_mutations.py`; the runs are those of fa3 in chunks, inside graphs, and of all levels in one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm.attention.columns import column_tensor
from cascade_llm.attention.flashinfer import chunks as flashinfer_chunks
from cascade_llm.attention.flashinfer import fused as flashinfer_fused
from cascade_llm.attention.flashinfer import levels as flashinfer_levels
from cascade_llm.attention.flashinfer.chunks import ChunkedLevelKernel, cut_level
from cascade_llm.attention.flashinfer.fused import FusedLevels, _PreparedFusedAttention, _read_levels
from cascade_llm.attention.flashinfer.graph import GraphAttention
from cascade_llm.attention.flashinfer.levels import LevelColumns, LevelKernel, LevelOutput
from cascade_llm.attention.flashinfer.table import ChunkRule, KernelTable
from cascade_llm.plan import CascadePlan
from cascade_llm.worker.cuda_graphs import CudaGraphs
from tests.engine.tiny_llm import save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import OPTIONS, PARAMS, PROMPTS, SHAPE, double_gpu, gpu_llm, is_noticed

CHUNKS = KernelTable(
    shared="prefill_fa3_chunks",
    decode_leaf="decode_tensor_cores",
    row_leaf="prefill_fa2",
    chunks=ChunkRule(min_packed_rows=1, min_tokens=1, chunk_tokens=30, max_chunks=4),
)
"""Prefixes of 64 tokens make two chunks, those of 40 one: of four chunks in a graph some are always empty."""
FUSED = replace(CHUNKS, shared="prefill_fa2", fused_levels=True)

Mutation = Callable[[pytest.MonkeyPatch], None]
OF_CHUNKS: dict[str, Mutation] = {}
OF_FUSED: dict[str, Mutation] = {}


def mutation(table: dict[str, Mutation], rule: str) -> Callable[[Mutation], Mutation]:
    def add(function: Mutation) -> Mutation:
        assert rule not in table
        table[rule] = function
        return function

    return add


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **SHAPE)


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    with tiny_llm(tiny, **OPTIONS) as llm:
        return [output["token_ids"] for output in llm.generate(PROMPTS, PARAMS)]


def run(folder: Path, kernels: KernelTable) -> list[list[int]]:
    eager = {"enforce_eager": True} if kernels.fused_levels else {}
    with gpu_llm(folder, double_gpu(num_sm=16), kernels, **OPTIONS, **eager) as llm:
        return [output["token_ids"] for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.parametrize("kernels", [CHUNKS, FUSED], ids=["chunks", "fused"])
def test_unchanged(tiny: Path, expected: list[list[int]], kernels: KernelTable) -> None:
    assert run(tiny, kernels) == expected


# -- fa3 in chunks ----------------------------------------------------------------------------------------------------


def changed_cut(patch: pytest.MonkeyPatch, change: Callable[[LevelColumns, LevelColumns], LevelColumns]) -> None:
    def changed(columns: LevelColumns, *arguments: Any) -> LevelColumns:
        return change(columns, cut_level(columns, *arguments))

    patch.setattr(flashinfer_chunks, "cut_level", changed)


@mutation(OF_CHUNKS, "an empty chunk has last_page_len 0, which fa3 takes for its length")
def _(patch: pytest.MonkeyPatch) -> None:
    changed_cut(patch, lambda _, cut: cut._replace(kv_last_page_len=cut.kv_last_page_len.clamp(min=4)))


@mutation(OF_CHUNKS, "page indices are in the order of chunks")
def _(patch: pytest.MonkeyPatch) -> None:
    changed_cut(patch, lambda columns, cut: cut._replace(kv_page_indices=columns.kv_page_indices.clone()))


@mutation(OF_CHUNKS, "rows are multiplied by the query heads that are packed")
def _(patch: pytest.MonkeyPatch) -> None:
    changed_cut(patch, lambda _, cut: cut._replace(qo_indptr=cut.qo_indptr // 2))


@mutation(OF_CHUNKS, "every chunk has rows of its own, since rows are where results are written")
def _(patch: pytest.MonkeyPatch) -> None:
    def one_block(columns: LevelColumns, cut: LevelColumns) -> LevelColumns:
        segments = len(columns.kv_last_page_len)
        return cut._replace(qo_indptr=cut.qo_indptr.clamp(max=int(cut.qo_indptr[segments])))

    changed_cut(patch, one_block)


@mutation(OF_CHUNKS, "query heads are packed by the KV head that they share")
def _(patch: pytest.MonkeyPatch) -> None:
    original = ChunkedLevelKernel.run

    def other_order(self: ChunkedLevelKernel, q: torch.Tensor, *arguments: Any) -> LevelOutput:
        return original(self, q.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2), *arguments)

    patch.setattr(ChunkedLevelKernel, "run", other_order)


@mutation(OF_CHUNKS, "chunks are merged row by row")
def _(patch: pytest.MonkeyPatch) -> None:
    def by_chunk(patched: Any, v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, chunks = v.shape[:2]
        merged = v.transpose(0, 1).reshape(rows, chunks, *v.shape[2:])
        return patched(merged, s.transpose(0, 1).reshape(rows, chunks, -1))  # type: ignore[no-any-return]

    changed_merge(patch, by_chunk)


@mutation(OF_CHUNKS, "chunks are merged from contiguous memory")
def _(patch: pytest.MonkeyPatch) -> None:
    def strided(patched: Any, v: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return patched(v.transpose(0, 1).contiguous().transpose(0, 1), s)  # type: ignore[no-any-return]

    changed_merge(patch, strided)


def changed_merge(patch: pytest.MonkeyPatch, change: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    original = ChunkedLevelKernel.run

    def run(self: ChunkedLevelKernel, *arguments: Any) -> LevelOutput:
        device = self._device
        self._device = replace(
            device, ops=replace(device.ops, merge_states=lambda v, s: change(device.ops.merge_states, v, s))
        )
        try:
            return original(self, *arguments)
        finally:
            self._device = device

    patch.setattr(ChunkedLevelKernel, "run", run)


@mutation(OF_CHUNKS, "fa3 is planned again when membership changes: lengths are in its plan")
def _(patch: pytest.MonkeyPatch) -> None:
    original = ChunkedLevelKernel.plan
    planned: set[int] = set()

    def plan(self: ChunkedLevelKernel, columns: LevelColumns) -> None:
        if id(self) not in planned or self._host is None:
            original(self, columns)
        planned.add(id(self))

    patch.setattr(ChunkedLevelKernel, "plan", plan)


@mutation(OF_CHUNKS, "fa3 is not asked how much plan memory it needs")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LevelKernel._shrink

    def asking(self: LevelKernel, columns: LevelColumns) -> None:
        self._wrapper.workspace_size(*self._arguments(columns), **self._options)
        original(self, columns)

    patch.setattr(LevelKernel, "_shrink", asking)


@mutation(OF_CHUNKS, "fa3's plan memory has room for a tile of every head")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flashinfer_levels, "_fa3_plan_bytes", lambda columns, spec: 512)


@mutation(OF_CHUNKS, "the first plan freezes the number of rows, so it is made with all of them")
def _(patch: pytest.MonkeyPatch) -> None:
    original = CudaGraphs._stand_in_columns
    patch.setattr(
        CudaGraphs,
        "_stand_in_columns",
        lambda self, room, rows, capacity: original(self, room, max(1, rows - 1), capacity),
    )


@mutation(OF_CHUNKS, "the number of chunks is fixed by the capture")
def _(patch: pytest.MonkeyPatch) -> None:
    original = ChunkedLevelKernel.arrange

    def fewer(self: ChunkedLevelKernel, columns: LevelColumns) -> LevelColumns:
        if self._host is None or len(columns.kv_page_indices) < 2:
            return original(self, columns)
        self.num_chunks -= 1
        lengths = flashinfer_chunks._lengths(columns, self._page_size)
        cut = cut_level(columns, lengths, self._page_size, self._spec.group_size, self.num_chunks, self._rule)
        columns.kv_page_indices.copy_(cut.kv_page_indices)
        self.num_chunks += 1
        return cut._replace(kv_page_indices=columns.kv_page_indices)

    patch.setattr(ChunkedLevelKernel, "arrange", fewer)


@mutation(OF_CHUNKS, "page indices are on the device before they are planned")
def _(patch: pytest.MonkeyPatch) -> None:
    original = GraphAttention.plan_shared

    def from_host(self: GraphAttention, position: int, level: Any, columns: LevelColumns) -> None:
        original(self, position, level, columns)
        kernel = self._shared[position].kernel
        kernel.plan(kernel.arrange(columns))

    patch.setattr(GraphAttention, "plan_shared", from_host)


# -- all levels in one launch -----------------------------------------------------------------------------------------


@mutation(OF_FUSED, "a request without pages has a length of 0")
def _(patch: pytest.MonkeyPatch) -> None:
    def unmasked(level: Any, page_size: int) -> torch.Tensor:
        pages = column_tensor(level.kv_page_indptr).diff()
        return (pages - 1).clamp(min=0) * page_size + column_tensor(level.kv_last_page_len).clamp(min=1)

    patch.setattr(flashinfer_fused, "_lengths", unmasked)


@mutation(OF_FUSED, "page indices are on the device: the kernel reads the caller's memory")
def _(patch: pytest.MonkeyPatch) -> None:
    def on_host(self: FusedLevels, levels: Any, page_entries: Any) -> torch.Tensor:
        return torch.cat([column_tensor(level.kv_page_indices) for level in levels])

    patch.setattr(FusedLevels, "_pages_on_device", on_host)


@mutation(OF_FUSED, "it is planned every step: lengths are in the plan")
def _(patch: pytest.MonkeyPatch) -> None:
    original = FusedLevels.prepare
    kept: dict[tuple[int, int], Any] = {}

    def once(self: FusedLevels, plan: CascadePlan) -> Any:
        key = plan.num_rows, len(_read_levels(plan))
        if key not in kept:
            kept[key] = original(self, plan)
        return kept[key]

    patch.setattr(FusedLevels, "prepare", once)


@mutation(OF_FUSED, "steps with several rows of a sequence need a causal mask, which shared levels have not")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FusedLevels, "serves", lambda self, plan: len(_read_levels(plan)) > 1)


@mutation(OF_FUSED, "queries are repeated for each level")
def _(patch: pytest.MonkeyPatch) -> None:
    original = _PreparedFusedAttention.attend

    def once(self: Any, layer: int, q: torch.Tensor) -> Any:
        run = self._run
        self._run = lambda repeated, *arguments, **options: run(q, *arguments, **options)
        try:
            return original(self, layer, q)
        finally:
            self._run = run

    patch.setattr(_PreparedFusedAttention, "attend", once)


@mutation(OF_FUSED, "the blocks of all levels are merged")
def _(patch: pytest.MonkeyPatch) -> None:
    original = _PreparedFusedAttention.attend

    def leaf_alone(self: Any, layer: int, q: torch.Tensor) -> Any:
        device = self._device
        self._device = replace(device, ops=replace(device.ops, merge_state_in_place=lambda *state: None))
        try:
            return original(self, layer, q)
        finally:
            self._device = device

    patch.setattr(_PreparedFusedAttention, "attend", leaf_alone)


@mutation(OF_FUSED, "it does not run in graphs")
def _(patch: pytest.MonkeyPatch) -> None:
    original = _PreparedFusedAttention.attend

    def captured(self: Any, layer: int, q: torch.Tensor) -> Any:
        found: list[Any] = []
        self._device.stream.capture(lambda: found.append(original(self, layer, q)))
        return found[0]

    patch.setattr(_PreparedFusedAttention, "attend", captured)


@mutation(OF_FUSED, "plan is told the model's dtype: FlashInfer's default is bfloat16")
def _(patch: pytest.MonkeyPatch) -> None:
    original = FusedLevels.prepare

    def default(self: FusedLevels, plan: CascadePlan) -> Any:
        self._spec = replace(self._spec, dtype=torch.bfloat16)
        return original(self, plan)

    patch.setattr(FusedLevels, "prepare", default)


@pytest.mark.parametrize("rule", OF_CHUNKS)
def test_breaking_a_rule_of_chunks_is_noticed(
    rule: str, tiny: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    OF_CHUNKS[rule](monkeypatch)
    assert is_noticed(lambda: run(tiny, CHUNKS), expected), f"unnoticed: {rule}"


@pytest.mark.parametrize("rule", OF_FUSED)
def test_breaking_a_rule_of_fused_levels_is_noticed(
    rule: str, tiny: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    OF_FUSED[rule](monkeypatch)
    assert is_noticed(lambda: run(tiny, FUSED), expected), f"unnoticed: {rule}"
