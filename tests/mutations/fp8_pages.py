"""Rules of pages of 8 bits.

The twin that says what is right knows nothing of 8-bit pages: the torch backend on float32 pages, into which K and V
are written as 8 bits and a scale would give them back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cascade_llm import SamplingParams
from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer import backend as flashinfer_backend
from cascade_llm.attention.flashinfer import graph as flashinfer_graph
from cascade_llm.attention.flashinfer import levels as flashinfer_levels
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.levels import FlashInferDevice, LevelKernel, LevelOutput, LevelRun
from cascade_llm.kv_cache.paged_kv_cache import KVScale, PagedKVCache
from cascade_llm.models.loading import KVScaleReader
from tests.engine.tiny_llm import save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of
from tests.mutations.harness import Plant, Scenario, mutations_of, scenario

FP8 = torch.float8_e4m3fn
SCALES = (KVScale(0.05, 0.002), KVScale(0.004, 0.001))
"""Of the two layers. K of the second goes beyond what 8 bits hold, and is clamped."""

PREFIX = [3 + (7 * i) % 80 for i in range(40)]
PROMPTS = [[*PREFIX, *(5 + (11 * i + j) % 80 for j in range(20 + i))] for i in range(5)]
PROMPTS += [[*PREFIX[:24], 50 + i] for i in range(2)] + [[60 - i for i in range(9)]]
PARAMS = [SamplingParams(temperature=0, max_tokens=6 + i, ignore_eos=True) for i in range(len(PROMPTS))]
OPTIONS: dict[str, Any] = {"page_size": 4, "cascade_shared_prefix_len": 16, "max_num_seqs": 8}

Tokens = list[list[int]]


def save_scaled(folder: Path) -> Path:
    """A checkpoint with scales of its own."""
    save_tiny(folder, "qwen3", **{**SHAPE, "head_dim": 128})
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for layer, scale in enumerate(SCALES):
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor(scale.k)
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([scale.v])
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def expected(scaled: Path) -> Tokens:
    """What the twin generates."""
    original = PagedKVCache.write

    def write_rounded(self: PagedKVCache, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        k, v = (_rounded(x, scale) for x, scale in zip((k, v), SCALES[layer], strict=True))
        original(self, layer, k, v, slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PagedKVCache, "write", write_rounded)
        with tiny_llm(scaled, attention_backend="torch", **OPTIONS) as twin:
            rounded = [output["token_ids"] for output in twin.generate(PROMPTS, PARAMS)]
    with tiny_llm(scaled, attention_backend="torch", **OPTIONS) as exact:
        unrounded = [output["token_ids"] for output in exact.generate(PROMPTS, PARAMS)]
    assert unrounded != rounded, "else no mutation shows that scales are used"
    return rounded


def _rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(FP8).float() * scale


def run(folder: Path) -> Tokens:
    with gpu_llm(folder, double_gpu(num_sm=4), kv_cache_dtype="fp8_e4m3", **OPTIONS) as llm:
        found = [output["token_ids"] for output in llm.generate(PROMPTS, PARAMS)]
        assert graphs_of(llm).counters.graph_steps > 0
        assert llm.stats()["cascade_steps"] > 0
        return found


FP8_PAGES = scenario(Scenario("FP8 pages", save_scaled, expected, run))
mutation = mutations_of(FP8_PAGES)


# -- what is written --------------------------------------------------------------------------------------------------


@mutation("rows are cast before they are appended: append reinterprets bytes")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PagedKVCache, "encode", lambda self, x, scale: x)


@mutation("rows are divided by their scale")
def _(patch: pytest.MonkeyPatch) -> None:
    original = PagedKVCache.encode
    patch.setattr(PagedKVCache, "encode", lambda self, x, scale: original(self, x, 1.0))


@mutation("rows are divided by their scale, not multiplied")
def _(patch: pytest.MonkeyPatch) -> None:
    original = PagedKVCache.encode
    patch.setattr(PagedKVCache, "encode", lambda self, x, scale: original(self, x, 1.0 / scale))


@mutation("rows are clamped: a conversion may make NaN of what is beyond")
def _(patch: pytest.MonkeyPatch) -> None:
    def not_clamped(self: PagedKVCache, x: torch.Tensor, scale: float) -> torch.Tensor:
        scaled = x.float() / scale
        return scaled.where(scaled.abs() <= 448, torch.nan).to(self.dtype)

    patch.setattr(PagedKVCache, "encode", not_clamped)


@mutation("K and V have scales of their own")
def _(patch: pytest.MonkeyPatch) -> None:
    original = FlashInferAttentionBackend.write

    def exchanged(self: FlashInferAttentionBackend, layer: int, k: Any, v: Any, slots: Any) -> None:
        scales = self.kv_cache.scales
        self.kv_cache.scales = [KVScale(scale.v, scale.k) for scale in scales]
        original(self, layer, k, v, slots)
        self.kv_cache.scales = scales

    patch.setattr(FlashInferAttentionBackend, "write", exchanged)


@mutation("scales are the checkpoint's")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(KVScaleReader, "scales", lambda self: [KVScale()] * len(SCALES))


# -- what is read -----------------------------------------------------------------------------------------------------


def with_k_scale(change: Callable[[LevelKernel, float], Any]) -> Plant:
    """Hand a kernel another scale of K than it should have."""
    original = LevelKernel.run

    def mutate(patch: pytest.MonkeyPatch) -> None:
        def changed(self: LevelKernel, q: torch.Tensor, kv: Any, output: LevelOutput, k_scale: float = 1.0) -> Any:
            return original(self, q, kv, output, change(self, k_scale))

        patch.setattr(LevelKernel, "run", changed)

    return mutate


def is_shared(kernel: LevelKernel) -> bool:
    return kernel._options.get("causal") is False


mutation("K's scale is in the softmax scale")(with_k_scale(lambda kernel, scale: 1.0))
mutation("K's scale is in the softmax scale of shared levels")(
    with_k_scale(lambda kernel, scale: 1.0 if is_shared(kernel) else scale)
)
mutation("K's scale is in the softmax scale of the leaf")(
    with_k_scale(lambda kernel, scale: scale if is_shared(kernel) else 1.0)
)
mutation("K's scale is there once")(with_k_scale(lambda kernel, scale: scale * scale))
mutation("K's scale is a number of the host's: a tensor would be read back in every layer")(
    with_k_scale(lambda kernel, scale: torch.tensor(scale))
)


@mutation("V's scale is no argument of a kernel: it would be another kernel in every level")
def _(patch: pytest.MonkeyPatch) -> None:
    def with_v_scale(self: LevelKernel, q: Any, kv: Any, output: LevelOutput, k_scale: float = 1.0) -> Any:
        self._wrapper.run(q, kv, out=output.out, lse=output.lse, return_lse=True, k_scale=k_scale, v_scale=0.002)
        return output

    patch.setattr(LevelKernel, "run", with_v_scale)


AttendLevels = Callable[..., None]


def with_attend_levels(make: Callable[[AttendLevels], AttendLevels]) -> Plant:
    """Replace the order of levels, in eager steps and in graphs."""
    original = flashinfer_levels.attend_levels

    def mutate(patch: pytest.MonkeyPatch) -> None:
        for module in (flashinfer_backend, flashinfer_graph):
            patch.setattr(module, "attend_levels", make(original))

    return mutate


def changed_scale(change: Callable[[KVScale], KVScale]) -> Plant:
    return with_attend_levels(lambda original: lambda *arguments: original(*arguments[:-1], change(arguments[-1])))


mutation("V's scale is multiplied")(changed_scale(lambda scale: scale._replace(v=1.0)))
mutation("V's scale is multiplied once")(changed_scale(lambda scale: scale._replace(v=scale.v**2)))
mutation("a layer is read with its own scales")(changed_scale(lambda scale: SCALES[0]))


def _leaf_alone(
    device: FlashInferDevice,
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    leaf: LevelKernel,
    shared: Sequence[LevelRun],
    result: LevelOutput,
    partial: LevelOutput | None,
    scale: KVScale,
) -> None:
    leaf.run(q, kv, result, scale.k)
    result.out.mul_(scale.v)
    for level in shared:
        assert partial is not None
        mine, other = result.first(level.num_rows), partial.first(level.num_rows)
        level.kernel.run(q[: level.num_rows], kv, other, scale.k)
        device.ops.merge_state_in_place(mine.out, mine.lse, other.out, other.lse)


mutation("V's scale is multiplied behind the last merge, or in every level")(
    with_attend_levels(lambda original: _leaf_alone)
)


@mutation("plan is told the dtype of the pages")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LevelKernel.plan

    def of_the_model(self: LevelKernel, columns: Any) -> None:
        self._options["kv_data_type"] = self._options["q_data_type"]
        original(self, columns)

    patch.setattr(LevelKernel, "plan", of_the_model)


@mutation("plan is told the dtype of the queries, not of the pages")
def _(patch: pytest.MonkeyPatch) -> None:
    original = LevelKernel.plan

    def of_the_pages(self: LevelKernel, columns: Any) -> None:
        self._options["q_data_type"] = self._options["kv_data_type"]
        original(self, columns)

    patch.setattr(LevelKernel, "plan", of_the_pages)


@mutation("results are of the queries' dtype")
def _(patch: pytest.MonkeyPatch) -> None:
    def of_the_pages(cls: type[LevelOutput], rows: int, spec: AttentionSpec) -> LevelOutput:
        shape = (rows, spec.num_qo_heads)
        return cls(torch.zeros((*shape, spec.head_dim), dtype=spec.page_dtype), torch.empty(shape))

    patch.setattr(LevelOutput, "empty", classmethod(of_the_pages))
