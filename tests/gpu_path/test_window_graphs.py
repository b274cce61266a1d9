"""Attention kinds with windows in captured graphs and in pieces, against the torch backend without cascade."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from cascade_llm import SamplingParams
from cascade_llm.config import ModelConfig, kinds_of_layers
from cascade_llm.worker import worker
from cascade_llm.worker.cuda_graphs import CudaGraphs
from tests.engine.tiny_llm import save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of
from tests.gpu_path.test_engine_on_double import tokens

PREFIX = [3 + (7 * i) % 80 for i in range(56)]
PROMPTS = [[*PREFIX, *(5 + (11 * i + j) % 80 for j in range(1 + 3 * i))] for i in range(5)] + [[9, 8, 7]]
PARAMS = [SamplingParams(temperature=0, max_tokens=14 + i, ignore_eos=True) for i in range(len(PROMPTS))]
KINDS: dict[str, tuple[int | None, ...]] = {
    "one window": (24, 24),
    "windows and all": (24, None),
    "two windows": (40, 24),
    "shorter than a page": (None, 3),
}
"""Of the two layers."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "mistral", **SHAPE, sliding_window=24)


@contextmanager
def with_windows(windows: tuple[int | None, ...]) -> Iterator[None]:
    """Models that are built inside have these windows."""
    read = worker.model_config_from_hf

    def changed(*fields: Any) -> ModelConfig:
        attention_kinds, layer_kinds = kinds_of_layers(windows)
        return replace(read(*fields), attention_kinds=attention_kinds, layer_kinds=layer_kinds)

    with patch.object(worker, "model_config_from_hf", changed):
        yield


def plain_tokens(folder: Path, windows: tuple[int | None, ...], **options: Any) -> Any:
    with with_windows(windows), tiny_llm(folder, enable_cascade_attention=False, **options) as twin:
        return tokens(twin.generate(PROMPTS, PARAMS))


@pytest.mark.parametrize("name", KINDS)
def test_graphs_equal_the_torch_backend(tiny: Path, name: str) -> None:
    windows = KINDS[name]
    expected = plain_tokens(tiny, windows)
    edges = 0
    original = CudaGraphs._plan_kind

    def counting(self: CudaGraphs, kind: int, plan: Any, *others: Any) -> None:
        nonlocal edges
        original(self, kind, plan, *others)
        window = self._windows[kind]
        edges += window is not None and int(window.edge_buffers(plan.num_rows).kv_page_indptr[-1]) > 0

    double = double_gpu()
    with (
        with_windows(windows),
        patch.object(CudaGraphs, "_plan_kind", counting),
        gpu_llm(tiny, double, max_num_seqs=8) as llm,
    ):
        assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
        counters = graphs_of(llm).counters
        assert counters.graph_steps >= 12
        assert set(counters.eager_steps) <= {"a sequence has several rows"}
        assert counters.piecewise_steps == sum(counters.eager_steps.values())
        assert llm.stats()["cascade_steps"] > 0
        assert edges > 3 or name == "shorter than a page"


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"page_size": 1}, {"page_size": 16}, {"max_num_batched_tokens": 16}], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_graphs_equal_the_torch_backend_for_other_pages_and_chunks(
    tiny: Path, name: str, options: dict[str, Any]
) -> None:
    expected = plain_tokens(tiny, KINDS[name], **options)
    with with_windows(KINDS[name]), gpu_llm(tiny, double_gpu(num_sm=4), max_num_seqs=8, **options) as llm:
        assert tokens(llm.generate(PROMPTS, PARAMS)) == expected
        assert graphs_of(llm).counters.graph_steps > 0
