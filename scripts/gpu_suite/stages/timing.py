"""Times of decode steps by the whole engine: per step, on the host by part, and idle times of the device between.

All sequences of a load decode at once behind one shared prefix; only steps in which all of them do are counted. The
floor is arithmetic (`sizes.decode_floor_s`), by the card's rates.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest.mock import patch

from cascade_llm import LLM, SamplingParams
from cascade_llm.engine.engine import StepEvent
from cascade_llm.worker import graph_shapes
from scripts.gpu_suite.machine import Machine, Replay
from scripts.gpu_suite.sizes import PAGE_SIZE, ModelShape, Sizes, decode_floor_s
from scripts.gpu_suite.stage import StageRun

__all__ = ["decode_together", "open_model", "run"]

LEFT_OUT = 8
"""Steps at the begin: buffers are touched, sampling graphs captured, for the first time."""
MEMORY_SHARE = 0.85


@dataclass
class _Steps:
    """Committed steps in which all sequences decoded."""

    batch: int
    at_s: list[float] = field(default_factory=list)
    events: list[StepEvent] = field(default_factory=list)

    def take(self, event: StepEvent) -> None:
        """An observer of the engine."""
        if event.result is not None and event.plan.num_rows == event.plan.num_sequences == self.batch:
            self.at_s.append(time.perf_counter())
            self.events.append(event)

    @property
    def step_s(self) -> list[float]:
        """Between one commit and the next."""
        times = self.at_s[LEFT_OUT:]
        return [b - a for a, b in pairwise(times)]

    def host_s(self, part: str) -> float:
        """The median of a part of the host's time."""
        return statistics.median(float(getattr(event, part)) for event in self.events[LEFT_OUT:])


def run(stage: StageRun) -> dict[str, Any]:
    """See the module."""
    results: list[dict[str, Any]] = []
    for model in stage.sizes.models:
        if not stage.has_time(20 if stage.machine.device.type == "cuda" else 0):
            results.append({"model": model.name, "skipped": "out of time"})
            continue
        started = time.perf_counter()
        with open_model(stage, model) as llm:
            results.append(_start_entry(model, llm, time.perf_counter() - started))
            for prefix, batch in stage.sizes.loads:
                entry: dict[str, Any] = {"model": model.name, "prefix": prefix, "batch": batch}
                if not stage.has_time():
                    entry["skipped"] = "out of time"
                elif not _fits(stage.machine, stage.sizes, model, prefix, batch):
                    entry["skipped"] = "more K/V than the card holds"
                else:
                    entry |= _load(stage, llm, model, prefix, batch)
                results.append(entry)
                stage.save(_told(results))
    return _told(results)


def open_model(stage: StageRun, model: ModelShape, **options: Any) -> LLM:
    """An engine that holds every load of the sizes; it captures graphs of the loads' batches alone."""
    sizes = stage.sizes
    batches = sorted({batch for _, batch in sizes.loads})
    longest = max(prefix for prefix, _ in sizes.loads) + _generated(sizes) + sizes.own_len + PAGE_SIZE
    with patch.object(graph_shapes, "ROW_BUCKETS", batches):
        return stage.machine.llm(
            model.write(stage.scratch),
            max_num_seqs=batches[-1],
            max_model_len=longest,
            page_size=PAGE_SIZE,
            **options,
        )


def decode_together(llm: LLM, prefix: int, batch: int, own_len: int, num_tokens: int) -> None:
    """Generate for `batch` sequences behind a prefix, whose prompts are in the cache already."""
    rng = random.Random(batch * 1_000_003 + prefix)
    vocab = llm.facts.model.vocab_size

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, vocab) for _ in range(count)]

    shared = tokens(prefix)
    prompts = [shared + tokens(own_len) for _ in range(batch)]
    if prefix:
        llm.generate(shared, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    llm.generate(prompts, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))


def _generated(sizes: Sizes) -> int:
    return sizes.decode_steps + LEFT_OUT + 4


def _load(stage: StageRun, llm: LLM, model: ModelShape, prefix: int, batch: int) -> dict[str, Any]:
    steps, sizes, card = _Steps(batch), stage.sizes, stage.machine.card
    before = llm.stats()
    llm.engine.on_step.append(steps.take)
    try:
        with stage.machine.replays() as replays:
            decode_together(llm, prefix, batch, sizes.own_len, _generated(sizes))
            idle = _idle(replays, steps)
    finally:
        llm.engine.on_step.remove(steps.take)
    llm.reset_prefix_cache()
    after = llm.stats()
    own_len = sizes.own_len + sizes.decode_steps // 2
    floor_s = decode_floor_s(model, batch, prefix, own_len, card.copy_bytes_per_s, card.matrix_flops_per_s)
    times = sorted(steps.step_s)
    median_s = statistics.median(times)
    return {
        "steps": len(times),
        "step_ms": 1e3 * median_s,
        "step_p95_ms": 1e3 * times[int(0.95 * (len(times) - 1))],
        "steps_ms": [round(1e3 * step_s, 4) for step_s in steps.step_s],
        "host_ms": {
            part.removesuffix("_s"): 1e3 * steps.host_s(part)
            for part in ("schedule_s", "submit_s", "wait_s", "commit_s")
        },
        **idle,
        "floor_ms": 1e3 * floor_s,
        "share_of_roofline": floor_s / median_s,
        "tokens_per_s": batch / median_s,
        "cascade_steps": after["cascade_steps"] - before["cascade_steps"],
        "graph_steps": after.get("graph_steps", 0) - before.get("graph_steps", 0),
    }


def _idle(replays: Callable[[], list[Replay]], steps: _Steps) -> dict[str, float]:
    """How long the device waited between the replays of the counted steps, all copies among the waiting; per step.

    A step replays two graphs, forward pass and sampling, and the counted steps are the last.
    """
    counted = replays()[-2 * len(steps.step_s) :]
    if not counted:
        return {}
    gaps = [max(0.0, b.begin_s - a.end_s) for a, b in pairwise(counted)]
    span = counted[-1].end_s - counted[0].begin_s
    per_step = 2 / len(counted)
    return {
        "gpu_busy_ms": 1e3 * per_step * sum(replay.end_s - replay.begin_s for replay in counted),
        "gpu_idle_ms": 1e3 * per_step * sum(gaps),
        "gpu_idle_share": sum(gaps) / span if span > 0 else 0.0,
    }


def _fits(machine: Machine, sizes: Sizes, model: ModelShape, prefix: int, batch: int) -> bool:
    tokens = prefix + batch * (sizes.own_len + _generated(sizes) + PAGE_SIZE)
    return model.weight_bytes + tokens * model.kv_bytes_per_token < MEMORY_SHARE * machine.memory_bytes


def _start_entry(model: ModelShape, llm: LLM, seconds: float) -> dict[str, Any]:
    capture = llm.facts.capture
    entry: dict[str, Any] = {"model": model.name, "start_s": seconds, "total_pages": llm.facts.total_pages}
    if capture is not None:
        entry |= {"num_graphs": capture.num_graphs, "capture_s": capture.seconds, "capture_bytes": capture.num_bytes}
        entry["dropped"] = [str(shape) for shape in capture.dropped]
    return entry


def _told(results: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [entry for entry in results if "step_ms" in entry]
    headline = {
        f"{entry['model']}, {entry['batch']} x {entry['prefix']}": f"{entry['step_ms']:.3g} ms, "
        f"{entry['share_of_roofline']:.0%} of the roofline, {entry.get('gpu_idle_share', 0):.0%} idle"
        for entry in measured
    }
    return {"verdict": "measured" if measured else "failed", "headline": headline, "loads": results}
