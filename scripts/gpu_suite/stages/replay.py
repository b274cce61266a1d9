"""Replayed graphs against float64 attention: every layer of every decode step, while groups come, change and go.

The captured forward pass leaves each layer's queries, output and LSE in fixed memory. A real engine then decodes
requests that arrive and leave by a script; after each step that a graph ran, its rows are compared with dense attention
over the pages that the step's own plan names. One layer is attention of level shapes alone; two are a whole step, in
which the second reads what the first has computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

from cascade_llm import LLM, SamplingParams
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.graph import GraphAttention
from cascade_llm.attention.reference import reference_attention
from cascade_llm.engine.engine import StepEvent
from cascade_llm.plan import CascadePlan
from cascade_llm.tiling import max_tiles
from cascade_llm.validation.attention_error import TOLERANCES, AttentionError
from cascade_llm.worker.executor import LocalExecutor
from cascade_llm.worker.graph_shapes import GraphShape, fitting_shape, graph_shapes
from cascade_llm.worker.model_runner import ModelRunner
from scripts.gpu_suite.arrivals import drive, longest_sequence, scripted
from scripts.gpu_suite.machine import Machine
from scripts.gpu_suite.sizes import PAGE_SIZE, ModelShape, Sizes
from scripts.gpu_suite.stage import StageRun

__all__ = ["LEAST_REPLANS", "Tape", "run"]

LEAST_REPLANS = 20
LAYERS = (1, 2)


class Tape:
    """What captured attention leaves of each layer, for as many rows as the largest graph has."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Graphs that are captured inside copy to the tape at every replay."""
        original = GraphAttention.attend

        def attend(attention: GraphAttention, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = original(attention, layer, q)
            if layer not in self._kept:  # the largest graph comes first, and runs once before it is captured
                self._kept[layer] = q.clone(), out.clone(), lse.clone()
            for kept, now in zip(self._kept[layer], (q, out, lse), strict=True):
                kept[: len(now)].copy_(now)
            return out, lse

        with patch.object(GraphAttention, "attend", attend):
            yield

    def layer(self, layer: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the last replay: q and out [rows, num_qo_heads, head_dim], lse [rows, num_qo_heads]."""
        q, out, lse = (kept[:num_rows].clone() for kept in self._kept[layer])
        return q, out, lse


@dataclass
class _Seen:
    """What came of the replays of one engine."""

    error: AttentionError = field(default_factory=AttentionError)
    worst_step: int = 0
    replays: int = 0
    most_rows: int = 0
    replans: int = 0
    """Replays with other pages, rows or levels than the one before."""
    groups_changed: int = 0
    """Shared levels that are other objects than in the replay before."""
    levels_emptied: int = 0
    """Replays with fewer shared levels than the one before."""
    empty_segments: int = 0
    """Replays with rows in an empty segment of a shared level."""
    pages_crossed: int = 0
    """Rows that began a page."""
    shapes_changed: int = 0
    """Replays of another graph than the one before."""
    shapes: set[str] = field(default_factory=set)
    before: CascadePlan | None = None
    shape_before: str = ""

    def take(self, plan: CascadePlan, shape: str) -> None:
        """Count one replay."""
        self.replays += 1
        self.most_rows = max(self.most_rows, plan.num_rows)
        self.shapes.add(shape)
        before, self.before = self.before, plan
        self.shapes_changed += self.shape_before not in ("", shape)
        self.shape_before = shape
        self.pages_crossed += sum(length == 1 for length in plan.leaf.kv_last_page_len)
        self.empty_segments += any(
            level.kv_page_indptr[i] == level.kv_page_indptr[i + 1]
            for level in plan.shared_levels
            for i in range(level.num_segments)
        )
        if before is None:
            return
        changed = before.shared_levels != plan.shared_levels
        self.groups_changed += changed
        self.levels_emptied += len(plan.shared_levels) < len(before.shared_levels)
        self.replans += changed or before.leaf.kv_page_indices != plan.leaf.kv_page_indices

    def missing(self, least_rows: int) -> list[str]:
        """What a load has to show for the comparison to mean anything, and did not."""
        least = dict.fromkeys(("groups_changed", "levels_emptied", "empty_segments", "pages_crossed"), 1)
        least |= {"shapes_changed": 1, "replans": LEAST_REPLANS, "most_rows": least_rows}
        return [name for name, number in least.items() if getattr(self, name) < number]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        counts = ("replays", "replans", "groups_changed", "levels_emptied", "empty_segments", "pages_crossed")
        return {
            "out_error": self.error.out,
            "lse_error": self.error.lse,
            "rows": self.error.num_rows,
            "worst_step": self.worst_step,
            **{name: getattr(self, name) for name in (*counts, "shapes_changed", "most_rows")},
            "shapes": sorted(self.shapes),
        }


def run(stage: StageRun) -> dict[str, Any]:
    """See the module."""
    results: list[dict[str, Any]] = []
    tolerance = TOLERANCES[stage.machine.dtype]
    for shape in stage.sizes.small_models:
        for num_layers in LAYERS:
            model = replace(shape, num_layers=num_layers, name=f"{shape.name}, {num_layers} layers")
            if not stage.has_time():
                results.append({"model": model.name, "skipped": "out of time"})
                continue
            seen = _replays(stage, model)
            missing = seen.missing(stage.sizes.least_rows)
            passed = seen.error.within(tolerance) and not missing
            results.append({"model": model.name, "passed": passed, "missing": missing, **seen.as_dict()})
            stage.save(_told(results, tolerance))
    return _told(results, tolerance)


def _told(results: list[dict[str, Any]], tolerance: float) -> dict[str, Any]:
    made = [entry for entry in results if "skipped" not in entry]
    wrong = [entry["model"] for entry in made if not entry["passed"]]
    return {
        "verdict": "passed" if made and not wrong else "failed",
        "headline": {
            "replays": sum(entry["replays"] for entry in made),
            "out_error": max((entry["out_error"] for entry in made), default=None),
            "lse_error": max((entry["lse_error"] for entry in made), default=None),
            "tolerance": tolerance,
            "wrong": wrong,
            "skipped": [entry["model"] for entry in results if "skipped" in entry],
        },
        "least_replans": LEAST_REPLANS,
        "models": results,
    }


def _replays(stage: StageRun, model: ModelShape) -> _Seen:
    arrivals, tape, seen = scripted(stage.sizes, model.vocab), Tape(), _Seen()
    with tape.recording(), _engine(stage.machine, stage.sizes, model, stage, longest_sequence(arrivals) + 1) as llm:
        executor = llm.engine.executor
        assert isinstance(executor, LocalExecutor)
        runner, num_before = executor.runner, 0
        cascade = llm.options.cascade
        shapes = graph_shapes(llm.options.max_num_seqs, runner.backend.spec.group_size, cascade.max_shared_levels)

        def compare(event: StepEvent) -> None:
            nonlocal num_before
            if event.result is None:
                return
            assert runner.graphs is not None
            counters = runner.graphs.counters
            if counters.graph_steps > num_before:
                num_before = counters.graph_steps
                seen.take(event.plan.cascade, str(_shape(runner, shapes, event.plan.cascade)))
                _compare(runner, tape, event.plan.cascade, seen)

        llm.engine.on_step.append(compare)
        drive(llm.engine, arrivals, SamplingParams(temperature=0))
    return seen


def _engine(machine: Machine, sizes: Sizes, model: ModelShape, stage: StageRun, longest: int) -> LLM:
    """Steps are committed before the next is planned, so that the tape holds the step that is looked at."""
    return machine.llm(
        model.write(stage.scratch),
        schedule_lag=0,
        page_size=PAGE_SIZE,
        max_num_seqs=sizes.families * sizes.per_family,
        max_model_len=longest,
        cascade_shared_prefix_len=PAGE_SIZE,
        kv_cache_bytes=sizes.families * sizes.per_family * (longest + PAGE_SIZE) * model.kv_bytes_per_token,
    )


def _shape(runner: ModelRunner, shapes: list[GraphShape], plan: CascadePlan) -> GraphShape | None:
    """The graph that served a plan."""
    spec, backend = runner.backend.spec, runner.backend
    assert isinstance(backend, FlashInferAttentionBackend)
    most_tiles = max_tiles(backend.platform.num_processors, spec.num_kv_heads)
    return fitting_shape(plan, shapes, spec.group_size, most_tiles)


@torch.inference_mode()
def _compare(runner: ModelRunner, tape: Tape, plan: CascadePlan, seen: _Seen) -> None:
    """One replay, all layers, against the definition of right."""
    pool = runner.kv_cache
    for layer in range(pool.num_layers):
        q, out, lse = tape.layer(layer, plan.num_rows)
        before = max(seen.error.out, seen.error.lse)
        expected = reference_attention(plan, pool, layer, q, runner.backend.spec.sm_scale)
        seen.error.add((out, lse), expected)
        if max(seen.error.out, seen.error.lse) > before:
            seen.worst_step = seen.replays
