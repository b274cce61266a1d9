"""One pass of torch's profiler over some decode steps of each model: kernels by time, and a trace to look at."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from cascade_llm import LLM
from cascade_llm.engine.engine import StepEvent
from scripts.gpu_suite.sizes import ModelShape
from scripts.gpu_suite.stage import StageRun
from scripts.gpu_suite.stages.timing import decode_together, open_model

__all__ = ["run"]

FIRST_STEP, NUM_STEPS = 12, 3
NUM_KERNELS = 30
TRACE_LIMIT_BYTES = 16 << 20
"""A larger file does not come back."""


class _Window:
    """Profiles some steps in the middle of many; an observer of the engine."""

    def __init__(self, batch: int, activities: list[ProfilerActivity]) -> None:
        self._batch, self._num_seen, self._is_running = batch, 0, False
        self.profiler = torch.profiler.profile(activities=activities)
        self.is_done = False

    def take(self, event: StepEvent) -> None:
        if event.result is None or event.plan.num_rows != self._batch or self.is_done:
            return
        self._num_seen += 1
        if self._num_seen == FIRST_STEP:
            self.profiler.start()
            self._is_running = True
        if self._num_seen == FIRST_STEP + NUM_STEPS:
            self.stop()

    def stop(self) -> None:
        """End it, if it has begun."""
        if self._is_running:
            self.profiler.stop()
        self._is_running, self.is_done = False, True


def run(stage: StageRun) -> dict[str, Any]:
    """See the module."""
    results = []
    for model in stage.sizes.models:
        if not stage.has_time():
            results.append({"model": model.name, "skipped": "out of time"})
            continue
        with open_model(stage, model) as llm:
            results.append(_profiled(stage, llm, model))
        stage.save(_told(results))
    return _told(results)


def _told(results: list[dict[str, Any]]) -> dict[str, Any]:
    profiled = [entry for entry in results if entry.get("kernels")]
    headline = {entry["model"]: entry["kernels"][0]["name"][:60] for entry in profiled}
    return {"verdict": "measured" if profiled else "failed", "headline": headline, "models": results}


def _profiled(stage: StageRun, llm: LLM, model: ModelShape) -> dict[str, Any]:
    """The load in the middle of the list."""
    prefix, batch = stage.sizes.loads[len(stage.sizes.loads) // 2]
    is_cuda = stage.machine.device.type == "cuda"
    window = _Window(batch, [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_cuda)
    llm.engine.on_step.append(window.take)
    decode_together(llm, prefix, batch, stage.sizes.own_len, FIRST_STEP + NUM_STEPS + 4)
    stage.machine.synchronize()
    window.stop()
    name = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    entries = [entry for entry in window.profiler.key_averages() if not is_cuda or entry.device_type.name == "CUDA"]
    found = sorted(entries, key=lambda entry: -getattr(entry, name))
    total = sum(getattr(entry, name) for entry in found)
    kernels = [
        {
            "name": entry.key[:120],
            "calls_per_step": entry.count / NUM_STEPS,
            "us_per_step": getattr(entry, name) / NUM_STEPS,
            "share": getattr(entry, name) / total if total else 0.0,
        }
        for entry in found[:NUM_KERNELS]
    ]
    trace = _write_trace(window.profiler, stage.folder / f"trace-{model.name}.json.gz", stage.scratch)
    return {"model": model.name, "prefix": prefix, "batch": batch, "kernels": kernels, "trace": trace}


def _write_trace(profiler: torch.profiler.profile, target: Path, scratch: Path) -> str:
    """Its file name, or why there is none."""
    plain = scratch / "trace.json"
    profiler.export_chrome_trace(str(plain))
    packed = gzip.compress(plain.read_bytes())
    if len(packed) > TRACE_LIMIT_BYTES:
        return f"{len(packed):,} bytes: too large to come back"
    target.write_bytes(packed)
    return target.name
