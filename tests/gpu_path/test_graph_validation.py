"""Validation compares what captured graphs generate with what the eager runner reads, and notices broken graphs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm.attention.flashinfer.graph import GraphAttention
from cascade_llm.config import EngineOptions
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.validation.engine_check import BATCH, EngineLoad, check_engine
from cascade_llm.validation.report import Check
from cascade_llm.worker import graph_shapes
from cascade_llm.worker.worker import build_worker
from tests.engine.tiny_llm import save_tiny
from tests.gpu_path.gpu_engine import SHAPE, double_gpu

LOAD = EngineLoad(prefix_len=24, num_places=12, num_settling=2, num_observed=4)
PAGE_SIZE = 4
COMPARED = ("log-probabilities, graphs against eager steps", "greedy tokens, graphs against eager steps")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **{**SHAPE, "num_hidden_layers": 1})


@pytest.fixture(autouse=True)
def few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_shapes, "ROW_BUCKETS", (32,))


def checked(tiny: Path, **options: Any) -> dict[str, Check]:
    engine_options = EngineOptions(
        dtype="float32", page_size=PAGE_SIZE, max_num_seqs=BATCH + 1, max_model_len=40, cascade_max_levels=2, **options
    )
    runner, facts = build_worker(engine_options, open_checkpoint(tiny), platform=double_gpu().platform())
    draw = random.Random(0)
    checks = check_engine(
        runner,
        facts,
        [draw.randrange(3, 97) for _ in range(300)],
        LOAD,
        page_size=PAGE_SIZE,
        max_levels=2,
        progress=lambda what, done, total: None,
    )
    return {check.name: check for check in checks}


def test_graphs_are_compared_with_eager_steps(tiny: Path) -> None:
    checks = checked(tiny)
    assert [name for name, check in checks.items() if not check.passed] == []
    assert checks["captured graphs ran"].figures["graph_steps"] >= LOAD.num_places - 5
    assert checks["captured graphs ran"].figures["piecewise_steps"] > 0
    assert checks[COMPARED[0]].figures["typical"] > 0, "else nothing was computed twice"
    assert checks[COMPARED[1]].figures["tokens"] == BATCH * 8


def test_graphs_that_leave_a_level_out_fail_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = GraphAttention.attend

    def leaf_alone(self: GraphAttention, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(self, "_shared", [])
            return attend(self, layer, q)

    monkeypatch.setattr(GraphAttention, "attend", leaf_alone)
    checks = checked(tiny)
    assert [name for name, check in checks.items() if not check.passed] == list(COMPARED), "eager steps were right"


def test_graphs_without_a_result_fail_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan_leaf = GraphAttention.plan_leaf

    def once(self: GraphAttention, columns: Any, pages: Any) -> None:
        if pages is None:
            plan_leaf(self, columns, pages)

    monkeypatch.setattr(GraphAttention, "plan_leaf", once)
    monkeypatch.setattr(GraphAttention, "holds", lambda self, position, level: True)
    (failed,) = [check for check in checked(tiny).values() if not check.passed]
    assert failed.name == "captured graphs ran"
    assert "not finite" in failed.found


def test_nothing_is_compared_where_there_are_no_graphs(tiny: Path) -> None:
    assert checked(tiny, enforce_eager=True).keys().isdisjoint({"captured graphs ran", *COMPARED})
