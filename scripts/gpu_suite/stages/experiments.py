"""What else may be asked, in the order of its worth: each stands alone, and the last are cut when the time is out.

- kernels: which kernel serves the leaf best, and FlashInfer's own cascade wrapper as the yardstick
- fp8: pages of 8 bits at each head size against float64 over what they decode to
- planning: what planning all levels, and planning the leaf alone, costs the host
- load: nano-vLLM's own benchmark load by the whole engine
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from cascade_llm import SamplingParams
from cascade_llm.attention.backend import column_tensor
from cascade_llm.attention.flashinfer.levels import DecodeKernel
from cascade_llm.attention.reference import reference_attention
from cascade_llm.bench.attention_cases import PAGE_SIZE, AttentionCase
from cascade_llm.kv_cache.paged_kv_cache import KVScale
from cascade_llm.validation.attention_error import largest_difference
from scripts.gpu_suite.captured_attention import Setting
from scripts.gpu_suite.stage import StageRun

__all__ = ["EXPERIMENTS", "run"]

LEAVES: tuple[DecodeKernel, ...] = ("decode_tensor_cores", "decode_cuda_cores")
SCALE = KVScale(0.5, 0.75)
"""Of pages of 8 bits: not 1, so that leaving one out shows."""
FP8_CASE = "1,8/64,40"
NUM_PLANS = 20


def run(stage: StageRun) -> dict[str, Any]:
    """See the module; an experiment that raises is a result, and the next one comes."""
    results: dict[str, Any] = {}
    for name, experiment in EXPERIMENTS.items():
        if not stage.has_time():
            results[name] = {"skipped": "out of time"}
            continue
        try:
            results[name] = experiment(stage)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        stage.save(_told(results))
    return _told(results)


def _told(results: dict[str, Any]) -> dict[str, Any]:
    headline = {name: found.get("error") or found.get("skipped") or "done" for name, found in results.items()}
    return {"verdict": "measured", "headline": headline, **results}


@torch.inference_mode()
def _kernels(stage: StageRun) -> dict[str, Any]:
    """Microseconds of a layer, all levels that a case has."""
    found: dict[str, Any] = {}
    for heads in stage.sizes.attention_heads:
        for name in stage.sizes.cases:
            if not stage.has_time():
                break
            case = AttentionCase.parse(name)
            setting, plan = Setting(stage.machine, case, heads), case.plan(case.shared_depths[:2])
            entry = found[f"{name}, {heads}"] = {}
            for leaf in LEAVES:
                work = setting.captured(plan, leaf)
                if work is not None:
                    entry[leaf] = 1e6 * stage.machine.seconds(work) / setting.num_layers
            if case.shared_depths and stage.machine.device.type == "cuda":
                work = _cascade_wrapper(setting, case)
                entry["flashinfer_cascade"] = 1e6 * stage.machine.seconds(work) / setting.num_layers
    return found


def _cascade_wrapper(setting: Setting, case: AttentionCase) -> Callable[[], object]:
    """FlashInfer's own composition, over all layers in turn."""
    import flashinfer  # the suite measures it against the engine: the package's one door does not need it

    spec, plan = setting.spec, case.plan(case.shared_depths[:2])
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device=spec.device)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(plan.levels), workspace, "NHD")
    names = ("qo_indptr", "kv_page_indptr", "kv_page_indices", "kv_last_page_len")
    columns = [[column_tensor(getattr(level, name)).to(spec.device) for level in plan.levels] for name in names]
    wrapper.plan(
        *columns, spec.num_qo_heads, spec.num_kv_heads, spec.head_dim, PAGE_SIZE, causal=False, q_data_type=spec.dtype
    )
    layers = [tuple(setting.pool.layer(layer)) for layer in range(setting.num_layers)]
    return lambda: [wrapper.run(setting.q, layer) for layer in layers]


@torch.inference_mode()
def _fp8(stage: StageRun) -> dict[str, Any]:
    """The largest errors of output and LSE."""
    found: dict[str, Any] = {}
    case = AttentionCase.parse(FP8_CASE)
    for heads in ((8, 2, 64), (8, 2, 128)):
        setting = Setting(stage.machine, case, heads, torch.float8_e4m3fn, SCALE)
        plan = case.plan(case.shared_depths)
        expected = reference_attention(plan, setting.pool, 0, setting.q, setting.spec.sm_scale)
        for leaf in LEAVES:
            try:
                out, lse = setting.backend(leaf).prepare(plan).attend(0, setting.q)
                errors = [largest_difference(a, b) for a, b in zip((out, lse), expected, strict=True)]
                found[f"{heads}, {leaf}"] = {"out": errors[0], "lse": errors[1]}
            except Exception as error:  # a kernel that cannot serve is a result too
                found[f"{heads}, {leaf}"] = f"{type(error).__name__}: {error}"[:300]
    return found


@torch.inference_mode()
def _planning(stage: StageRun) -> dict[str, Any]:
    """Microseconds of the host for one plan; shared levels that are the same objects keep theirs."""
    found: dict[str, Any] = {}
    for name in stage.sizes.cases:
        case = AttentionCase.parse(name)
        setting = Setting(stage.machine, case, stage.sizes.attention_heads[0])
        depths, backend = case.shared_depths[:2], setting.backend()
        same = case.plan(depths)
        backend.prepare(same)  # the first plan allocates
        runs = {"all_levels_us": [case.plan(depths) for _ in range(NUM_PLANS)], "leaf_alone_us": [same] * NUM_PLANS}
        found[name] = {}
        for what, plans in runs.items():
            backend.prepare(same)
            stage.machine.synchronize()
            started = time.perf_counter()
            for plan in plans:
                backend.prepare(plan)
            stage.machine.synchronize()
            found[name][what] = 1e6 * (time.perf_counter() - started) / NUM_PLANS
    return found


def _load(stage: StageRun) -> dict[str, Any]:
    """Random prompts and lengths of seed 0, temperature 0.6, on the smallest model."""
    model, (low, high) = stage.sizes.models[0], stage.sizes.load_range
    rng = random.Random(0)
    most, count = min(10000, model.vocab - 1), stage.sizes.load_requests
    prompts = [[rng.randint(0, most) for _ in range(rng.randint(low, high))] for _ in range(count)]
    lengths = [rng.randint(low, high) for _ in range(count)]
    params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=length) for length in lengths]
    folder = model.write(stage.scratch)
    with stage.machine.llm(folder, max_model_len=2 * high + 1, max_num_seqs=count, page_size=PAGE_SIZE) as llm:
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True))
        started = time.perf_counter()
        llm.generate(prompts, params)
        seconds, counters = time.perf_counter() - started, llm.engine.executor.counters()
    return {
        "requests": count,
        "in_tokens": sum(map(len, prompts)),
        "out_tokens": sum(lengths),
        "seconds": seconds,
        "out_tokens_per_s": sum(lengths) / seconds,
        **counters,
    }


EXPERIMENTS: Mapping[str, Callable[[StageRun], dict[str, Any]]] = {
    "kernels": _kernels,
    "fp8": _fp8,
    "planning": _planning,
    "load": _load,
}
