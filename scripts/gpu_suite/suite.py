"""The stages, in order; each writes what it found before the next begins."""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_suite.attention_stage import measure_attention, measure_plans, validate_kernels
from scripts.gpu_suite.engine_stage import measure_engine_steps, measure_load
from scripts.gpu_suite.machine import Machine
from scripts.gpu_suite.plots import write_plots
from scripts.gpu_suite.rates import measure_rates
from scripts.gpu_suite.shapes import Sizes

__all__ = ["STAGES", "Suite"]

STAGES = ("rates", "validation", "attention", "plans", "engine_steps", "load")
PLOT_RESERVE_S = 15.0


class Suite:
    """One run. A stage that fails is recorded with its traceback, and the next one begins."""

    def __init__(self, machine: Machine, out: Path, sizes: Sizes, budget_s: float, *, fp8: bool = False) -> None:
        """`fp8`: whether kernels are validated over FP8 pages too."""
        self._machine, self._out, self._sizes = machine, out, sizes
        self._fp8, self._stage_name = fp8, "nothing yet"
        self._ends = time.perf_counter() + budget_s
        self.results: dict[str, Any] = {"machine": _describe(machine), "seconds": {}}
        out.mkdir(parents=True, exist_ok=True)

    def run(self, stages: Sequence[str] = STAGES) -> dict[str, Any]:
        """Run stages; returns all results, which are also in `results.json`."""
        with tempfile.TemporaryDirectory() as folder:
            for stage in stages:
                started, self._stage_name = time.perf_counter(), stage
                print(f"stage {stage} ...", flush=True)
                try:
                    self.results[stage] = self._stage(stage, Path(folder))
                except Exception:
                    self.results[f"{stage}_failed"] = traceback.format_exc()[-4000:]
                    print(self.results[f"{stage}_failed"], flush=True)
                self.results["seconds"][stage] = time.perf_counter() - started
                self.save()
        archive = write_plots(self.results, self._out)
        self.results["plots"] = archive.name if archive else "matplotlib is missing"
        self.save()
        return self.results

    def save(self) -> None:
        """Write the results so far; the file is whole at any time."""
        scratch = self._out / "results.json.new"
        scratch.write_text(json.dumps(self.results, indent=1))
        scratch.replace(self._out / "results.json")

    def stop(self) -> None:
        """Say in the results that time ran out; for another thread, while a stage hangs."""
        said = f"out of time in stage {self._stage_name}"
        print(said, flush=True)
        self.results = {**self.results, "stopped": said}
        self.save()

    def _stage(self, stage: str, folder: Path) -> Any:
        machine, sizes = self._machine, self._sizes
        with torch.inference_mode():
            if stage == "rates":
                return measure_rates(machine, sizes)
            if stage == "validation":
                return validate_kernels(machine, sizes, self._has_time(0.7), fp8=self._fp8)
            if stage == "plans":
                return measure_plans(machine, sizes, self._has_time(0.4))
            if stage == "attention":
                return measure_attention(machine, sizes, *self._rates(), self._has_time(0.4))
        if stage == "engine_steps":
            return measure_engine_steps(machine, sizes, folder, *self._rates(), self._has_time(0.15), self._save_steps)
        if stage == "load":
            return measure_load(machine, sizes, folder, self._has_time(0.0))
        raise ValueError(f"unknown stage {stage!r}: {', '.join(STAGES)}")

    def _rates(self) -> tuple[float, float]:
        if "rates" not in self.results:
            self.results["rates"] = measure_rates(self._machine, self._sizes)
        rates = self.results["rates"]
        return rates["copy_bytes_per_s"], rates["matrix_flops_per_s"]

    def _has_time(self, kept_share: float) -> Callable[[], bool]:
        """Whether a stage may go on: a share of what is left now is kept for the stages behind it."""
        begun = time.perf_counter()
        until = begun + (self._ends - PLOT_RESERVE_S - begun) * (1 - kept_share)
        return lambda: time.perf_counter() < until

    def _save_steps(self, entries: list[dict[str, Any]]) -> None:
        self.results["engine_steps"] = entries
        self.save()


def _describe(machine: Machine) -> dict[str, Any]:
    described: dict[str, Any] = {"torch": torch.__version__, "device": str(machine.device)}
    if machine.device.type == "cuda":
        properties = torch.cuda.get_device_properties(machine.device)
        described |= {"name": properties.name, "memory_bytes": properties.total_memory}
    return described
