"""Attention alone, a layer at a time from graphs, with pools too large for the last-level cache.

For trees of K/V every choice of shared levels is timed beside plain attention: where does cascade attention win, by
prefix length and rows, and does the cost model know? Its constants are fitted to the same times.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.bench.attention_cases import AttentionCase
from cascade_llm.bench.calibration import fit_costs
from cascade_llm.device.device_name import last_level_cache_bytes
from cascade_llm.engine.cost_setup import attention_shape, calibration_key, table_costs
from cascade_llm.scheduler.cascade.calibration import Calibration
from cascade_llm.scheduler.cascade.cost_model import CostModel, PlanWork, plan_work
from scripts.gpu_suite.captured_attention import Setting, head_spec
from scripts.gpu_suite.machine import Card, Machine
from scripts.gpu_suite.stage import StageRun

__all__ = ["floor_s", "run"]

MAX_LEVELS = 2
Measured = list[tuple[PlanWork, float]]


def run(stage: StageRun) -> dict[str, Any]:
    """See the module."""
    results: list[dict[str, Any]] = []
    fits: list[dict[str, Any]] = []
    with torch.inference_mode():
        for heads in stage.sizes.attention_heads:
            measured: Measured = []
            spec = head_spec(stage.machine, heads)
            model = CostModel(attention_shape(spec), table_costs(spec.device)[1])
            for name in stage.sizes.cases:
                entry = _timed(stage.machine, name, heads, model, measured, stage.has_time)
                results.append({"heads": list(heads), "case": name, **entry})
                stage.save(_told(results, fits))
            if measured:
                fits.append(_fitted(spec, model, measured))
    return _told(results, fits)


def floor_s(case: AttentionCase, spec: AttentionSpec, card: Card) -> float:
    """Of one layer: every node's K/V read once, at the card's rates, level after level."""
    seconds = 0.0
    for nodes, tokens in zip(case.nodes, case.tokens, strict=True):
        num_bytes = nodes * tokens * 2 * spec.num_kv_heads * spec.head_dim * spec.page_dtype.itemsize
        flops = case.num_sequences * tokens * 4 * spec.num_qo_heads * spec.head_dim
        seconds += max(num_bytes / card.copy_bytes_per_s, flops / card.matrix_flops_per_s)
    return seconds


def _timed(
    machine: Machine,
    name: str,
    heads: tuple[int, int, int],
    model: CostModel,
    measured: Measured,
    has_time: Callable[[], bool],
) -> dict[str, Any]:
    """Microseconds of a layer for each choice of levels, "" being plain attention; `measured` gets them too."""
    if not has_time():
        return {"skipped": "out of time"}
    case = AttentionCase.parse(name)
    setting = Setting(machine, case, heads)
    times: dict[str, float] = {}
    errors: dict[str, str] = {}
    for depths in case.subsets(MAX_LEVELS):
        label, plan = ",".join(map(str, depths)), case.plan(depths)
        try:
            work = setting.captured(plan)
            if work is None:
                errors[label] = "no graph of that shape"
                continue
            times[label] = machine.seconds(work) / setting.num_layers
            measured.append((plan_work(plan), times[label]))
        except Exception as error:  # a shape that cannot be served is a result too
            errors[label] = f"{type(error).__name__}: {error}"[:300]
    entry: dict[str, Any] = {"us": {label: 1e6 * seconds for label, seconds in times.items()}, "errors": errors}
    entry |= {"layers": setting.num_layers, "floor_us": 1e6 * floor_s(case, setting.spec, machine.card)}
    chosen = ",".join(map(str, case.chosen(model, MAX_LEVELS)))
    if "" in times and chosen in times:
        best = min(times, key=times.__getitem__)
        entry |= {"best": best, "chosen": chosen, "regret": times[chosen] / times[best] - 1}
        entry["cascade_speedup"] = times[""] / min((s for label, s in times.items() if label), default=times[""])
    return entry


def _fitted(spec: AttentionSpec, start: CostModel, measured: Measured) -> dict[str, Any]:
    """Constants as a calibration file keeps them."""
    llc_bytes = last_level_cache_bytes(spec.device) // 2
    model = fit_costs(replace(start, costs=replace(start.costs, llc_bytes=llc_bytes)), measured)
    errors = [abs(model.plan_s(work) / seconds - 1) for work, seconds in measured]
    calibration = Calibration(
        key=calibration_key(spec, "flashinfer"),
        costs=model.costs,
        median_error=statistics.median(errors),
        worst_error=max(errors),
        num_measured=len(measured),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    table_errors = [abs(start.plan_s(work) / seconds - 1) for work, seconds in measured]
    return {**asdict(calibration), "median_error_of_the_table": statistics.median(table_errors)}


def _told(results: list[dict[str, Any]], fits: list[dict[str, Any]]) -> dict[str, Any]:
    decided = [entry for entry in results if "regret" in entry]
    headline = {
        "cases": len(decided),
        "rightly_chosen": sum(entry["regret"] <= 0.05 for entry in decided),
        "worst_regret": max((entry["regret"] for entry in decided), default=None),
        "best_speedup": max((entry["cascade_speedup"] for entry in decided), default=None),
    }
    return {"verdict": "measured" if decided else "failed", "headline": headline, "cases": results, "costs": fits}
