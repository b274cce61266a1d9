"""The engine's ways of running against each other: graphs or eager, lag 0 or 1, cascade attention on or off.

Small random models serve requests that arrive and leave by a script. The yardstick is eager, lag 0, no cascade. The
stage `blocking` does the same with every launch waited for, and must give the very tokens that `engine` gave: the same
kernels ran on the same plans, so a difference is a race.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from cascade_llm import LLM, SamplingParams
from cascade_llm.config import CascadeConfig
from cascade_llm.engine.assembly import build_scheduler
from cascade_llm.engine.engine import Engine, StepEvent
from cascade_llm.outputs import CompletionOutput
from cascade_llm.scheduler.cascade.choice import TokensRead
from scripts.gpu_suite.arrivals import Arrival, drive, longest_sequence, scripted
from scripts.gpu_suite.equality import TOLERANCE, Equality
from scripts.gpu_suite.sizes import PAGE_SIZE, ModelShape
from scripts.gpu_suite.stage import StageRun

__all__ = ["KINDS", "run"]

REPORTED = 8
KINDS: Mapping[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0, logprobs=REPORTED),
    "filtered": SamplingParams(temperature=0.8, top_k=20, top_p=0.9, logprobs=REPORTED),
    "penalties": SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.3, logprobs=REPORTED),
}
MAX_BATCHED_TOKENS = 256
"""Of a step: long prompts come in chunks beside sequences that decode."""


class Way(NamedTuple):
    """A way of running."""

    graphs: bool
    lag: int
    cascade: bool

    def __str__(self) -> str:
        graphs, cascade = ("graphs" if self.graphs else "eager"), ("cascade" if self.cascade else "one level")
        return f"{graphs}, lag {self.lag}, {cascade}"


YARDSTICK = Way(graphs=False, lag=0, cascade=False)
Outputs = dict[str, CompletionOutput]


def run(stage: StageRun) -> dict[str, Any]:
    """See the module."""
    earlier = _earlier(stage) if stage.name == "blocking" else None
    results: list[dict[str, Any]] = []
    tokens: dict[str, dict[str, list[int]]] = {}
    for model in stage.sizes.small_models:
        if not stage.has_time():
            results.append({"run": model.name, "skipped": "out of time"})
            continue
        outputs, counters = _all_ways(stage, model)
        for (way, kind), found in outputs.items():
            name = f"{model.name}: {way}, {kind}"
            tokens[name] = {request: output.token_ids for request, output in found.items()}
            equality = Equality(TOLERANCE[stage.machine.dtype])
            equality.add(outputs[YARDSTICK, kind], found, KINDS[kind])
            missing = _missing(way, counters[way], stage.sizes.least_rows)
            entry: dict[str, Any] = {"run": name, **equality.as_dict(), **counters[way], "missing": missing}
            entry["passed"] = entry["passed"] and not missing
            if earlier is not None:
                entry["races"] = _num_different(earlier.get(name), tokens[name])
                entry["passed"] = entry["passed"] and not entry["races"]
            results.append(entry)
        stage.save(_told(results, tokens))
    return _told(results, tokens)


def _told(results: list[dict[str, Any]], tokens: Mapping[str, Any]) -> dict[str, Any]:
    made = [entry for entry in results if "skipped" not in entry]
    wrong = [entry["run"] for entry in made if not entry["passed"]]
    headline = {
        "runs": len(made),
        "wrong": wrong,
        "skipped": [entry["run"] for entry in results if "skipped" in entry],
        "tokens": sum(entry["tokens"] for entry in made),
        "near_ties": sum(entry["near_ties"] for entry in made),
        "draws_differing": sum(entry["draws_differing"] for entry in made),
        "largest_logprob_difference": max((entry["largest_logprob_difference"] for entry in made), default=None),
        "races": sum(entry.get("races") or 0 for entry in made),
        "compared_for_races": sum(entry.get("races") is not None for entry in made),
    }
    verdict = "passed" if made and not wrong else "failed"
    return {"verdict": verdict, "headline": headline, "runs": results, "tokens": tokens}


def _all_ways(stage: StageRun, model: ModelShape) -> tuple[dict[tuple[Way, str], Outputs], dict[Way, dict[str, int]]]:
    """The outputs of every way and kind of sampling; and how each way ran its steps."""
    arrivals = scripted(replace(stage.sizes, longest=stage.sizes.longest_equal), model.vocab, seed=1)
    outputs: dict[tuple[Way, str], Outputs] = {}
    counters: dict[Way, dict[str, int]] = {}
    for graphs in (False, True):
        with _start(stage, model, arrivals, graphs) as llm:
            for lag, cascade in product((0, 1), (False, True)):
                way = Way(graphs, lag, cascade)
                before = llm.engine.executor.counters()
                found = counters[way] = {"cascade_steps": 0, "most_rows": 0}
                for kind, params in KINDS.items():
                    engine = _engine(llm, way)
                    engine.on_step.append(partial(_note_rows, found))
                    outputs[way, kind] = drive(engine, arrivals, params)
                    found["cascade_steps"] += engine.scheduler.counters.cascade_steps
                after = llm.engine.executor.counters()
                found |= {name: after.get(name, 0) - before.get(name, 0) for name in ("graph_steps", "piecewise_steps")}
    return outputs, counters


def _note_rows(counters: dict[str, int], event: StepEvent) -> None:
    """An observer of the engine: how wide decode steps are."""
    if event.plan.num_rows == event.plan.num_sequences:
        counters["most_rows"] = max(counters["most_rows"], event.plan.num_rows)


def _missing(way: Way, counters: Mapping[str, int], least_rows: int) -> list[str]:
    """Where a way did not run as it should have, or ran too little to prove anything."""
    wanted = {"graph_steps": way.graphs, "piecewise_steps": way.graphs, "cascade_steps": way.cascade}
    few = ["most_rows"] if counters["most_rows"] < least_rows else []
    return few + [name for name, is_wanted in wanted.items() if (counters[name] > 0) != is_wanted]


def _start(stage: StageRun, model: ModelShape, arrivals: Sequence[Arrival], graphs: bool) -> LLM:
    """An engine whose runner serves several schedulers one after another."""
    longest, max_num_seqs = longest_sequence(arrivals) + 1, len(arrivals)
    return stage.machine.llm(
        model.write(stage.scratch),
        enforce_eager=not graphs,
        page_size=PAGE_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        max_model_len=longest,
        kv_cache_bytes=max_num_seqs * (longest + PAGE_SIZE) * model.kv_bytes_per_token,
    )


def _engine(llm: LLM, way: Way) -> Engine:
    """A scheduler with an empty prefix cache over the runner of an engine."""
    scheduler = build_scheduler(
        llm.facts,
        TokensRead(),
        page_size=PAGE_SIZE,
        max_num_seqs=llm.options.max_num_seqs,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        cascade=CascadeConfig(enabled=way.cascade, shared_prefix_len=PAGE_SIZE if way.cascade else None),
    )
    return Engine(scheduler, llm.engine.executor, None, lag=way.lag)


def _earlier(stage: StageRun) -> dict[str, dict[str, list[int]]]:
    """The tokens of the stage `engine`; nothing where it got nowhere."""
    file = stage.folder / "engine.json"
    if not file.exists():
        return {}
    found: dict[str, dict[str, list[int]]] = json.loads(file.read_text())["result"].get("tokens", {})
    return found


def _num_different(earlier: dict[str, list[int]] | None, now: dict[str, list[int]]) -> int | None:
    """Sequences whose tokens are others; None where there is nothing to compare with."""
    return None if earlier is None else sum(earlier.get(name) != token_ids for name, token_ids in now.items())
