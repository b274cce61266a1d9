"""The engine: decode steps against their floor, and nano-vLLM's own benchmark load."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cascade_llm import LLM, SamplingParams
from cascade_llm.worker import graph_shapes
from cascade_llm.worker.cuda_graphs import CudaGraphs
from cascade_llm.worker.executor import LocalExecutor
from scripts.gpu_suite.machine import Machine
from scripts.gpu_suite.rates import decode_floor_s
from scripts.gpu_suite.shapes import PAGE_SIZE, ModelShape, Sizes

__all__ = ["measure_engine_steps", "measure_load"]


VARIANTS: dict[str, dict[str, Any]] = {
    "graphs, cascade": {},
    "graphs, one level": {"enable_cascade_attention": False},
    "eager, cascade": {"enforce_eager": True},
}
"""Measured in this order, while time is left."""


def measure_engine_steps(
    machine: Machine,
    sizes: Sizes,
    folder: Path,
    bytes_per_s: float,
    flops_per_s: float,
    has_time: Callable[[], bool],
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """Milliseconds of a decode step by batch, prefix and variant; one prefix for the whole batch."""
    results: list[dict[str, Any]] = []
    for name, options in VARIANTS.items():
        for shape in sizes.models:
            if not has_time():
                results.append({"skipped": f"{shape.name}, {name}: out of time"})
                continue
            longest = max(sizes.prefixes) + sizes.own_len + sizes.decode_steps + PAGE_SIZE
            started = time.perf_counter()
            try:
                with patch.object(graph_shapes, "ROW_BUCKETS", sizes.batches):  # a third of the graphs to capture
                    llm = machine.llm(
                        shape.write(folder / shape.name),
                        max_num_seqs=max(sizes.batches),
                        max_model_len=longest,
                        page_size=PAGE_SIZE,
                        **options,
                    )
            except Exception as error:
                results.append(
                    {"model": shape.name, "variant": name, "error": f"{type(error).__name__}: {error}"[:500]}
                )
                save(results)
                continue
            with llm:
                results.append(_start_entry(shape, name, llm, time.perf_counter() - started))
                for prefix, batch in product(sizes.prefixes, sizes.batches):
                    if not has_time():
                        results.append({"skipped": f"{shape.name}, {name}, {batch} x {prefix}: out of time"})
                        continue
                    entry: dict[str, Any] = {"model": shape.name, "variant": name, "batch": batch, "prefix": prefix}
                    try:
                        entry |= _decode_step(machine, llm, sizes, batch, prefix)
                        floor = decode_floor_s(shape, batch, prefix, sizes.own_len, bytes_per_s, flops_per_s)
                        entry |= {"floor_ms": 1e3 * floor, "over_floor": entry["step_ms"] / (1e3 * floor)}
                    except Exception as error:
                        entry["error"] = f"{type(error).__name__}: {error}"[:500]
                    results.append(entry)
                    save(results)
    return results


def _start_entry(shape: ModelShape, variant: str, llm: LLM, seconds: float) -> dict[str, Any]:
    capture = llm.facts.capture
    graphs = {}
    if capture is not None:
        graphs = {
            "num_graphs": capture.num_graphs,
            "capture_s": capture.seconds,
            "capture_bytes": capture.num_bytes,
            "dropped": len(capture.dropped),
        }
    return {"model": shape.name, "variant": variant, "start_s": seconds, "total_pages": llm.facts.total_pages, **graphs}


def _decode_step(machine: Machine, llm: LLM, sizes: Sizes, batch: int, prefix: int) -> dict[str, Any]:
    """The time of a step while all of the batch decodes, from the end of their prefill on."""
    rng = random.Random(batch * 1_000_003 + prefix)
    vocab = llm.facts.model.vocab_size
    shared = [rng.randrange(3, vocab) for _ in range(prefix)]
    prompts = [shared + [rng.randrange(3, vocab) for _ in range(sizes.own_len)] for _ in range(batch)]
    if prefix:
        llm.generate(shared, SamplingParams(temperature=0, max_tokens=1, ignore_eos=True))
    one = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    many = SamplingParams(temperature=0, max_tokens=1 + sizes.decode_steps, ignore_eos=True)
    llm.generate(prompts, one)  # the prompts are cached from here on
    graphs = _graphs(llm)
    before, eager_before = llm.stats(), Counter(graphs.counters.eager_steps) if graphs else Counter[str]()
    prefill_s, decode_s = _seconds(machine, llm, prompts, one), _seconds(machine, llm, prompts, many)
    after = llm.stats()
    return {
        "step_ms": 1e3 * max(decode_s - prefill_s, 1e-9) / sizes.decode_steps,
        "cascade_steps": after["cascade_steps"] - before["cascade_steps"],
        "eager_steps": dict(graphs.counters.eager_steps - eager_before) if graphs else None,
    }


def _seconds(machine: Machine, llm: LLM, prompts: list[list[int]], params: SamplingParams) -> float:
    machine.synchronize()
    started = time.perf_counter()
    llm.generate(prompts, params)
    machine.synchronize()
    return time.perf_counter() - started


def measure_load(machine: Machine, sizes: Sizes, folder: Path, has_time: Callable[[], bool]) -> dict[str, Any]:
    """nano-vLLM's bench.py: random prompts and lengths of seed 0, temperature 0.6, on the smallest shape."""
    if not has_time():
        return {"skipped": "out of time"}
    shape, (low, high) = sizes.models[0], sizes.load_range
    rng = random.Random(0)
    most = min(10000, shape.vocab - 1)
    prompts = [[rng.randint(0, most) for _ in range(rng.randint(low, high))] for _ in range(sizes.load_requests)]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=rng.randint(low, high))
        for _ in range(sizes.load_requests)
    ]
    config = shape.write(folder / shape.name)
    entry = {"model": shape.name, "requests": len(prompts), "in_tokens": sum(map(len, prompts))}
    return entry | _run_load(machine, config, prompts, params)


def _run_load(machine: Machine, config: Path, prompts: list[list[int]], params: list[SamplingParams]) -> dict[str, Any]:
    longest = max(len(prompt) + p.max_tokens for prompt, p in zip(prompts, params, strict=True))
    with machine.llm(config, max_model_len=longest + 1, max_num_seqs=len(prompts)) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True))
        started = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - started
        counters = graphs.counters if (graphs := _graphs(llm)) else None
    out_tokens = sum(len(output["token_ids"]) for output in outputs)
    return {
        "out_tokens": out_tokens,
        "seconds": seconds,
        "out_tokens_per_s": out_tokens / seconds,
        "graph_steps": counters.graph_steps if counters else 0,
        "eager_steps": dict(counters.eager_steps) if counters else None,
        "eagerly_sampled_steps": dict(counters.eagerly_sampled_steps) if counters else None,
    }


def _graphs(llm: LLM) -> CudaGraphs | None:
    """The captured graphs of an engine."""
    assert isinstance(llm.engine.executor, LocalExecutor)
    return llm.engine.executor.runner.graphs
