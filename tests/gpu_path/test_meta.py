"""The whole engine on meta tensors, where host and device cannot be mixed up without notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.levels import LevelBuffers, LevelOutput
from cascade_llm.errors import CascadeError
from cascade_llm.layers.flashinfer_layer_ops import FlashInferLayerOps
from cascade_llm.sampling.lanes import LaneState
from cascade_llm.worker import worker
from cascade_llm.worker.piecewise import PiecewiseGraphs
from cascade_llm.worker.step_buffers import StepBuffers
from tests.doubles.flashinfer import FlashInferDouble
from tests.doubles.meta import ANY_TOKEN, MetaStream
from tests.doubles.planner import DoubleError
from tests.engine.tiny_llm import save_tiny
from tests.gpu_path.gpu_engine import OPTIONS, PARAMS, PROMPTS, SHAPE, gpu_llm, graphs_of

LARGE_STEPS: dict[str, Any] = {**OPTIONS, "max_num_batched_tokens": 1024}
"""Prompts in steps that are too large for pieces, which therefore run eagerly."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **SHAPE)


@pytest.fixture(autouse=True)
def meta_is_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """No user may ask for it, and it has no memory to measure."""
    monkeypatch.setattr(worker, "resolve_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(worker, "step_bytes", lambda *arguments, **options: 0)


def run(folder: Path, **options: Any) -> Any:
    double = FlashInferDouble(MetaStream(), num_sm=16, exact=True)
    with gpu_llm(folder, double, **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS)
        assert [set(output["token_ids"]) for output in outputs] == [{ANY_TOKEN}] * len(PROMPTS)
        return graphs_of(llm).counters


@pytest.mark.parametrize("lag", [0, 1])
def test_captured_steps_and_pieces_keep_host_and_device_apart(tiny: Path, lag: int) -> None:
    counters = run(tiny, schedule_lag=lag, **OPTIONS)
    assert counters.graph_steps > 10
    assert counters.piecewise_steps > 3


def test_eager_steps_keep_host_and_device_apart(tiny: Path) -> None:
    counters = run(tiny, **LARGE_STEPS)
    assert counters.eager_steps.total() > counters.piecewise_steps


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def columns_of_a_leaf(patch: pytest.MonkeyPatch) -> None:
    original = StepBuffers.leaf_buffers
    patch.setattr(StepBuffers, "leaf_buffers", lambda self, rows: LevelBuffers(*map(on_host, original(self, rows))))


def results_of_a_level(patch: pytest.MonkeyPatch) -> None:
    original = LevelOutput.empty.__func__  # type: ignore[attr-defined]
    patch.setattr(
        LevelOutput, "empty", classmethod(lambda cls, rows, spec: cls(*map(on_host, original(cls, rows, spec))))
    )


def row_numbers_of_the_rotation(patch: pytest.MonkeyPatch) -> None:
    original = FlashInferLayerOps.__init__

    def made(self: FlashInferLayerOps, *arguments: Any) -> None:
        original(self, *arguments)
        self._row_numbers = on_host(self._row_numbers)

    patch.setattr(FlashInferLayerOps, "__init__", made)


def table_of_appends(patch: pytest.MonkeyPatch) -> None:
    original = FlashInferAttentionBackend.__init__

    def made(self: FlashInferAttentionBackend, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self._append_table = tuple(map(on_host, self._append_table))  # type: ignore[assignment]

    patch.setattr(FlashInferAttentionBackend, "__init__", made)


def what_lies_between_pieces(patch: pytest.MonkeyPatch) -> None:
    original = PiecewiseGraphs.__init__

    def made(self: PiecewiseGraphs, *arguments: Any) -> None:
        original(self, *arguments)
        self._attended = on_host(self._attended)

    patch.setattr(PiecewiseGraphs, "__init__", made)


def last_tokens_of_lanes(patch: pytest.MonkeyPatch) -> None:
    original = LaneState.__init__

    def made(self: LaneState, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self.last_tokens = on_host(self.last_tokens)

    patch.setattr(LaneState, "__init__", made)


@pytest.mark.parametrize(
    "plant",
    [
        columns_of_a_leaf,
        pytest.param(results_of_a_level, marks=pytest.mark.slow),
        pytest.param(row_numbers_of_the_rotation, marks=pytest.mark.slow),
        table_of_appends,
        what_lies_between_pieces,
        pytest.param(last_tokens_of_lanes, marks=pytest.mark.slow),
    ],
    ids=lambda plant: plant.__name__,
)
def test_memory_on_the_wrong_side_is_noticed(
    plant: Callable[[pytest.MonkeyPatch], None], tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    with pytest.raises((DoubleError, CascadeError), match="host"):
        run(tiny, **OPTIONS)
