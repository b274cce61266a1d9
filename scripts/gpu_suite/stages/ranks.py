"""Two ranks that share a model, on a GPU each: their exchanges, and the engine beside that of one rank.

An exchange is timed as the engine has it, replayed from a graph: `scripts/rank_speeds.py` assumes 10 us for it.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cascade_llm.device.ranks import Ranks, join_ranks
from cascade_llm.outputs import CompletionOutput
from scripts.gpu_suite.arrivals import drive, longest_sequence, scripted
from scripts.gpu_suite.equality import TOLERANCE, Equality
from scripts.gpu_suite.machine import Machine
from scripts.gpu_suite.sizes import PAGE_SIZE, ModelShape
from scripts.gpu_suite.stage import StageRun
from scripts.gpu_suite.stages.engine import KINDS, MAX_BATCHED_TOKENS

__all__ = ["run"]

NUM_RANKS = 2
WAIT_S = 100.0
"""For processes that time exchanges."""


def run(stage: StageRun) -> dict[str, Any]:
    """See the module."""
    if stage.machine.num_devices < NUM_RANKS:
        why = f"{NUM_RANKS} ranks need as many GPUs, here are {stage.machine.num_devices}"
        return {"verdict": "not run", "headline": {"why": why}}
    exchanges = _exchanges(stage)
    stage.save(_told(exchanges, []))
    runs: list[dict[str, Any]] = []
    for model in stage.sizes.small_models:
        if stage.has_time() and model.num_qo_heads % NUM_RANKS == 0:
            runs += _compared(stage, model)
            stage.save(_told(exchanges, runs))
    return _told(exchanges, runs)


def _told(exchanges: Mapping[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    wrong = [entry["run"] for entry in runs if not entry["passed"]] + list(exchanges["wrong"])
    headline = {"runs": len(runs), "wrong": wrong, "us_of_a_sum": exchanges["us"]}
    return {"verdict": "passed" if runs and not wrong else "failed", "headline": headline, "runs": runs}


def _compared(stage: StageRun, model: ModelShape) -> list[dict[str, Any]]:
    """Two ranks against one, in graphs with cascade attention, for each kind of sampling."""
    alone, _ = _outputs(stage, model, 1)
    shared, counters = _outputs(stage, model, NUM_RANKS)
    missing = [name for name in ("graph_steps", "piecewise_steps") if not counters.get(name)]
    entries = []
    for kind, params in KINDS.items():
        equality = Equality(TOLERANCE[stage.machine.dtype])
        equality.add(alone[kind], shared[kind], params)
        entry = {"run": f"{model.name}, {kind}", **equality.as_dict(), "missing": missing}
        entries.append({**entry, "passed": entry["passed"] and not missing})
    return entries


def _outputs(
    stage: StageRun, model: ModelShape, num_ranks: int
) -> tuple[dict[str, dict[str, CompletionOutput]], dict[str, int]]:
    """By kind of sampling and request; and what graphs did, of rank 0."""
    arrivals = scripted(stage.sizes, model.vocab, seed=2)
    longest, max_num_seqs = longest_sequence(arrivals) + 1, len(arrivals)
    with stage.machine.llm(
        model.write(stage.scratch),
        tensor_parallel_size=num_ranks,
        page_size=PAGE_SIZE,
        cascade_shared_prefix_len=PAGE_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        max_model_len=longest,
        kv_cache_bytes=max_num_seqs * (longest + PAGE_SIZE) * model.kv_bytes_per_token,
    ) as llm:
        outputs = {kind: drive(llm.engine, arrivals, params) for kind, params in KINDS.items()}
        return outputs, llm.engine.executor.counters()


def _exchanges(stage: StageRun) -> dict[str, Any]:
    """What rank 0 of processes of their own found; a rank that raises is told."""
    context = multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    machine = f"{type(stage.machine).__module__}:{type(stage.machine).__name__}"
    arguments = (NUM_RANKS, machine, stage.scratch / "ranks", stage.sizes.exchanged, found)
    processes = [context.Process(target=_of_one_rank, args=(index, *arguments)) for index in range(NUM_RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(WAIT_S)
        if process.is_alive():
            process.kill()
            process.join()
    told: dict[str, Any] = {"wrong": [f"rank ended with status {p.exitcode}" for p in processes if p.exitcode]}
    told["us"] = {}
    while not found.empty():
        kind, value = found.get()
        told["wrong" if kind == "wrong" else "us"] = value if kind == "us" else told["wrong"] + value
    return told


def _of_one_rank(index: int, count: int, machine: str, meeting_point: Path, sizes: tuple[int, ...], found: Any) -> None:
    """The work of a process: check each exchange, and time sums of so many numbers."""
    import importlib

    if torch.cuda.is_available():
        torch.cuda.set_device(index)
    module, _, kind = machine.partition(":")
    own: Machine = getattr(importlib.import_module(module), kind)()
    ranks = join_ranks(index, count, meeting_point, own.device)
    wrong = _wrong_exchanges(ranks, own)
    us = {size: 1e6 * own.seconds(_sum_of(ranks, own, size)) for size in sizes}
    found.put(("wrong", [f"rank {index}: {name}" for name in wrong]))
    if ranks.is_first:
        found.put(("us", {str(size * own.dtype.itemsize): round(time, 1) for size, time in us.items()}))
    ranks.least(0, own.device)
    ranks.close()


def _sum_of(ranks: Ranks, machine: Machine, size: int) -> Any:
    x = torch.zeros(size, dtype=machine.dtype, device=machine.device)
    return lambda: ranks.all_reduce(x)


def _wrong_exchanges(ranks: Ranks, machine: Machine) -> list[str]:
    """Names of those whose result is not what it must be."""
    own = torch.full((1000,), float(ranks.index + 1), dtype=machine.dtype, device=machine.device)
    total = ranks.count * (ranks.count + 1) / 2
    parts, told = ranks.gather(own.clone()), own.clone()
    ranks.broadcast(told)
    right = {
        "sum": bool((ranks.all_reduce(own.clone()) == total).all()),
        "gather": not ranks.is_first or [float(part[7]) for part in parts] == [i + 1.0 for i in range(ranks.count)],
        "broadcast": bool((told == 1).all()),
        "least": ranks.least(10 + ranks.index, machine.device) == 10,
    }
    return [name for name, is_right in right.items() if not is_right]
