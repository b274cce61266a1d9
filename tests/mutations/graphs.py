"""Rules of the device, of graphs and of FlashInfer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm.attention.backend import StepAttention, column_tensor
from cascade_llm.attention.flashinfer import backend as flashinfer_backend
from cascade_llm.attention.flashinfer import levels as flashinfer_levels
from cascade_llm.attention.flashinfer.graph import GraphAttention
from cascade_llm.attention.flashinfer.levels import LevelBuffers, LevelColumns, LevelKernel, LevelOutput, LevelRun
from cascade_llm.plan import CascadePlan, StepResult
from cascade_llm.scheduler.step_planner import StepPlanner
from cascade_llm.worker import graph_sampling
from cascade_llm.worker.cuda_graphs import CudaGraphs
from cascade_llm.worker.graph_shapes import GraphShape, fitting_shape
from cascade_llm.worker.step_buffers import HostBuffers, StepBuffers
from tests.engine.tiny_llm import save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import OPTIONS, PARAMS, PROMPTS, SHAPE, double_gpu, gpu_llm
from tests.mutations.harness import Scenario, mutations_of, scenario


def expected(folder: Path) -> list[list[int]]:
    """By torch on the CPU."""
    with tiny_llm(folder, **OPTIONS) as llm:
        return [output["token_ids"] for output in llm.generate(PROMPTS, PARAMS)]


def run(folder: Path) -> list[list[int]]:
    with gpu_llm(folder, double_gpu(num_sm=16), **OPTIONS) as llm:
        return [output["token_ids"] for output in llm.generate(PROMPTS, PARAMS)]


@contextmanager
def alternating_graphs() -> Iterator[None]:
    """Every other step takes a larger graph than it needs, so that one level is met by several graphs."""
    steps = count()

    def alternating(self: CudaGraphs, plan: CascadePlan) -> GraphShape | None:
        shapes = list(self._shapes)
        smallest = fitting_shape(plan, shapes, self._group_size, self._most_tiles)
        if smallest is None or next(steps) % 2 == 0:
            return smallest
        larger = [shape for shape in shapes if shape.rows > smallest.rows]
        return fitting_shape(plan, larger, self._group_size, self._most_tiles) or smallest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CudaGraphs, "_fitting_shape", alternating)
        yield


GROUPED = scenario(Scenario("grouped heads", partial(save_tiny, architecture="qwen3", **SHAPE), expected, run))
UNGROUPED = scenario(
    Scenario(
        "as many KV heads as query heads",  # decoded on CUDA cores
        partial(save_tiny, architecture="llama", **{**SHAPE, "num_key_value_heads": 4}),
        expected,
        run,
    )
)
ALTERNATING = scenario(replace(GROUPED, name="alternating graphs", around=alternating_graphs))
mutation = mutations_of(GROUPED)


# -- plans and columns ------------------------------------------------------------------------------------------------


@mutation("the number of segments of a captured level is fixed")
def _(patch: pytest.MonkeyPatch) -> None:
    original = HostBuffers.shared_columns

    def unpadded(self: HostBuffers, level: Any, rows: int, capacity: int) -> LevelColumns:
        return original(self, level, rows, level.num_segments)

    patch.setattr(HostBuffers, "shared_columns", unpadded)


@mutation("the first plan freezes the number of rows, so it is made with all of them")
def _(patch: pytest.MonkeyPatch) -> None:
    original = HostBuffers.stand_in_columns
    patch.setattr(
        HostBuffers,
        "stand_in_columns",
        lambda self, rows, capacity, page: original(self, max(1, rows - 1), capacity, page),
    )


@mutation("padding rows are inside a segment: rows outside qo_indptr are not written")
def _(patch: pytest.MonkeyPatch) -> None:
    original = HostBuffers.shared_columns

    def short(self: HostBuffers, level: Any, rows: int, capacity: int) -> LevelColumns:
        columns = original(self, level, rows, capacity)
        columns.qo_indptr.clamp_(max=level.num_rows)
        return columns

    patch.setattr(HostBuffers, "shared_columns", short)


@mutation("an empty segment has last_page_len 0")
def _(patch: pytest.MonkeyPatch) -> None:
    original = HostBuffers.shared_columns

    def ones(self: HostBuffers, level: Any, rows: int, capacity: int) -> LevelColumns:
        columns = original(self, level, rows, capacity)
        columns.kv_last_page_len.clamp_(min=1)
        return columns

    patch.setattr(HostBuffers, "shared_columns", ones)


@mutation("a leaf whose kernel splits K/V is planned again when pages are added")
def _(patch: pytest.MonkeyPatch) -> None:
    original = GraphAttention.plan_leaf

    def once(self: GraphAttention, columns: LevelColumns, pages: Any) -> None:
        if pages is None:
            original(self, columns, pages)

    patch.setattr(GraphAttention, "plan_leaf", once)


@mutation("a shared level is planned again when it is another object")
def _(patch: pytest.MonkeyPatch) -> None:
    planned: set[int] = set()

    def holds(self: GraphAttention, position: int, level: Any) -> bool:
        key = hash((id(self), position))
        return key in planned or bool(planned.add(key))

    patch.setattr(GraphAttention, "holds", holds)


@mutation("every graph and level has a plan memory of its own")
def _(patch: pytest.MonkeyPatch) -> None:
    one = torch.empty(1 << 20, dtype=torch.uint8)

    def shared(self: LevelKernel, columns: LevelColumns) -> None:
        self._wrapper.reset_workspace_buffer(self._device.float_workspace, one)

    patch.setattr(LevelKernel, "_shrink", shared)


@mutation("the plan memory is as large as the plan")
def _(patch: pytest.MonkeyPatch) -> None:
    def small(self: LevelKernel, columns: LevelColumns) -> None:
        self._wrapper.reset_workspace_buffer(self._device.float_workspace, torch.empty(64, dtype=torch.uint8))

    patch.setattr(LevelKernel, "_shrink", small)


@mutation("a plan has the layout that the graph was captured with")
def _(patch: pytest.MonkeyPatch) -> None:
    original = GraphAttention.plan_leaf

    def other_split(self: GraphAttention, columns: LevelColumns, pages: Any) -> None:
        if pages is not None:
            self._leaf._options["disable_split_kv"] = not self._leaf._options["disable_split_kv"]
        original(self, columns, pages)

    patch.setattr(GraphAttention, "plan_leaf", other_split)


@mutation("page indices are on the device before they are planned")
def _(patch: pytest.MonkeyPatch) -> None:
    original = GraphAttention.plan_shared

    def from_host(self: GraphAttention, position: int, level: Any, columns: LevelColumns) -> None:
        original(self, position, level, columns)
        self._shared[position].kernel.plan(columns)

    patch.setattr(GraphAttention, "plan_shared", from_host)


@mutation("captured kernels read the buffers that steps are written to")
def _(patch: pytest.MonkeyPatch) -> None:
    original = StepBuffers.leaf_buffers

    def cloned(self: StepBuffers, rows: int) -> LevelBuffers:
        return LevelBuffers(*(buffer.clone() for buffer in original(self, rows)))

    patch.setattr(StepBuffers, "leaf_buffers", cloned)


@mutation("plan is told the model's dtype: FlashInfer's default is float16")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LevelKernel.plan

    def default(self: LevelKernel, columns: LevelColumns) -> None:
        self._options.pop("q_data_type", None)
        original(self, columns)

    patch.setattr(LevelKernel, "plan", default)


@mutation("the kernel family is named: FlashInfer's own choice is not ours")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LevelKernel, "_prefill_wrapper", lambda self, buffers: _auto_wrapper(self))


def _auto_wrapper(kernel: LevelKernel) -> Any:
    device = kernel._device
    return device.ops.BatchPrefillWithPagedKVCacheWrapper(device.float_workspace, "NHD")


@mutation("rows behind the last shared segment are left out of the merge")
def _(patch: pytest.MonkeyPatch) -> None:
    original = flashinfer_backend._SharedLevel.planned

    def all_rows(self: Any, level: Any) -> LevelRun:
        planned = original(self, level)
        return LevelRun(planned.kernel, level.num_rows)

    patch.setattr(flashinfer_backend._SharedLevel, "planned", all_rows)


# -- results ----------------------------------------------------------------------------------------------------------


@mutation("out is contiguous")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LevelOutput.empty.__func__  # type: ignore[attr-defined]

    def strided(cls: type[LevelOutput], rows: int, spec: Any) -> LevelOutput:
        out, lse = original(cls, rows, spec)
        return cls(torch.empty(spec.num_qo_heads, rows, spec.head_dim, dtype=out.dtype).transpose(0, 1), lse)

    patch.setattr(LevelOutput, "empty", classmethod(strided))


@mutation("the log-sum-exp is float32")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LevelOutput.empty.__func__  # type: ignore[attr-defined]

    def short(cls: type[LevelOutput], rows: int, spec: Any) -> LevelOutput:
        out, lse = original(cls, rows, spec)
        return cls(out, lse.bfloat16())

    patch.setattr(LevelOutput, "empty", classmethod(short))


@mutation("the log-sum-exp is base 2")
def _(patch: pytest.MonkeyPatch) -> None:
    original = flashinfer_levels.LevelKernel.run

    def natural(self: LevelKernel, q: torch.Tensor, kv: Any, output: LevelOutput, k_scale: float) -> None:
        original(self, q, kv, output, k_scale)
        output.lse.mul_(0.6931471805599453)

    patch.setattr(LevelKernel, "run", natural)


@mutation("levels are merged by their log-sum-exp")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LevelKernel.run

    def flat(self: LevelKernel, q: torch.Tensor, kv: Any, output: LevelOutput, k_scale: float) -> None:
        original(self, q, kv, output, k_scale)
        output.lse.zero_()

    patch.setattr(LevelKernel, "run", flat)


@mutation("what one graph leaves in the pool is not read after another was replayed")
def _(patch: pytest.MonkeyPatch) -> None:
    def leave_in_pool(self: CudaGraphs, attentions: Any, rows: int) -> None:
        columns = self._buffers.columns
        step = StepAttention(attentions, self._backend, [columns.slots[:rows]])
        hidden = self._decoder.forward(self._input_tokens(rows), columns.positions[:rows], step)
        logits = self._decoder.logits(hidden)
        self._logits = torch.nn.functional.pad(logits, (0, 0, 0, len(self._logits) - rows))

    patch.setattr(CudaGraphs, "_forward", leave_in_pool)


@mutation("results are read after their event")
def _(patch: pytest.MonkeyPatch) -> None:
    original = CudaGraphs._sampled

    def at_once(self: CudaGraphs, plan: Any, rows: int, features: Any, host: Any) -> Any:
        original(self, plan, rows, features, host)
        tokens, _ = host.results.clone().tolist()
        result = _result_of(plan, tokens)
        return lambda: result

    patch.setattr(CudaGraphs, "_sampled", at_once)


def _result_of(plan: Any, tokens: list[int]) -> Any:
    return StepResult(step_id=plan.step_id, token_ids=[tokens[row] for row in plan.sample_rows])


# -- capture ----------------------------------------------------------------------------------------------------------


@mutation("everything runs once before it is captured")
def _(patch: pytest.MonkeyPatch) -> None:
    original = CudaGraphs._forward
    seen: set[int] = set()

    def only_second(self: CudaGraphs, attentions: Any, rows: int) -> None:
        if id(attentions) in seen:
            original(self, attentions, rows)
        seen.add(id(attentions))

    patch.setattr(CudaGraphs, "_forward", only_second)


@mutation("nothing is planned during capture")
def _(patch: pytest.MonkeyPatch) -> None:
    original = GraphAttention.attend

    def planning(self: GraphAttention, layer: int, q: torch.Tensor) -> Any:
        columns = torch.arange(self.rows + 1, dtype=torch.int32)
        lengths = torch.ones(self.rows, dtype=torch.int32)
        self._leaf.plan(LevelColumns(columns, columns, self._leaf_indices[:0], lengths))
        return original(self, layer, q)

    patch.setattr(GraphAttention, "attend", planning)


@mutation("the host reads nothing during capture")
def _(patch: pytest.MonkeyPatch) -> None:
    original = StepAttention.__call__

    def reading(self: StepAttention, *layer_and_heads: Any) -> torch.Tensor:
        assert int(self._slots.max()) >= 0
        return original(self, *layer_and_heads)

    patch.setattr(StepAttention, "__call__", reading)


@mutation("no pageable memory is copied during capture")
def _(patch: pytest.MonkeyPatch) -> None:
    original = graph_sampling.choose
    patch.setattr(
        graph_sampling,
        "choose",
        lambda needs, logits, *rest, **options: original(needs, logits + torch.tensor([0.0]), *rest, **options),
    )


# -- host and device --------------------------------------------------------------------------------------------------


@mutation("host buffers are not written while their copy is in flight")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepBuffers, "take_host", lambda self: self._hosts[0])


@mutation("two sets of host buffers take turns, each after its event")
def _(patch: pytest.MonkeyPatch) -> None:
    def result_of_the_other(self: StepBuffers) -> Any:
        host = self._hosts[0]
        if host.in_use is not None:
            host.in_use.synchronize()
        return host

    patch.setattr(StepBuffers, "take_host", result_of_the_other)


@mutation("a wrapper's own pinned memory is not planned into while its copy is in flight")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LevelKernel.plan

    def without_wait(self: LevelKernel, columns: LevelColumns) -> None:
        planned, self._planned = self._planned, None
        fixed, self._is_fixed = self._is_fixed, self._is_fixed and planned is None
        original(self, columns)
        self._is_fixed = fixed

    patch.setattr(LevelKernel, "plan", without_wait)


@mutation("padding rows write to a page that no sequence has")
def _(patch: pytest.MonkeyPatch) -> None:
    original = HostBuffers.write_padding

    def to_page_0(self: HostBuffers, first: int, rows: int, *, first_leaf_page: int) -> None:
        original(self, first, rows, first_leaf_page=first_leaf_page)
        self.columns.slots[first:rows] = 0

    patch.setattr(HostBuffers, "write_padding", to_page_0)


@mutation("a published page is not written again, not even with what it holds")
def _(patch: pytest.MonkeyPatch) -> None:
    original = StepPlanner._plan_sequence

    def one_page_again(self: StepPlanner, draft: Any, sequence: Any, num_new: int) -> bool:
        if sequence.planned_len == sequence.num_cached_tokens > 0:
            sequence.planned_len = sequence.committed_len = sequence.planned_len - self._config.page_size
        return original(self, draft, sequence, num_new)

    patch.setattr(StepPlanner, "_plan_sequence", one_page_again)


@mutation("the tokens of padding rows go to a lane that no sequence has")
def _(patch: pytest.MonkeyPatch) -> None:
    original = HostBuffers.write_padding

    def to_lane_0(self: HostBuffers, first: int, rows: int, *, first_leaf_page: int) -> None:
        original(self, first, rows, first_leaf_page=first_leaf_page)
        self.columns.sample_lanes[first:rows] = 0

    patch.setattr(HostBuffers, "write_padding", to_lane_0)


@mutation("a token that is not known yet comes from its lane")
def _(patch: pytest.MonkeyPatch) -> None:
    original = HostBuffers.write_step

    def from_host(self: HostBuffers, plan: Any, rows: int) -> int:
        num_pages = original(self, plan, rows)
        self.columns.token_lanes[:rows] = self._padding.no_lane
        self.columns.token_ids[: plan.num_rows] = column_tensor(plan.token_ids)
        return num_pages

    patch.setattr(HostBuffers, "write_step", from_host)


@mutations_of(ALTERNATING)("columns that another graph has overwritten are written again")
def _columns_of_another_graph(patch: pytest.MonkeyPatch) -> None:
    def holds(self: GraphAttention, position: int, level: Any) -> bool:
        shared = self._shared[position]
        return shared.level is not None and shared.level() is level

    patch.setattr(GraphAttention, "holds", holds)


@mutations_of(UNGROUPED)("CUDA-core decode sees no row without pages")
def _padding_without_pages(patch: pytest.MonkeyPatch) -> None:
    original = HostBuffers.write_padding

    def no_page(self: HostBuffers, first: int, rows: int, *, first_leaf_page: int) -> None:
        original(self, first, rows, first_leaf_page=first_leaf_page)
        self.columns.leaf_indptr[first + 1 : rows + 1] = first_leaf_page
        self.columns.leaf_last_page_len[first:rows] = 0

    patch.setattr(HostBuffers, "write_padding", no_page)
