"""Each FlashInfer call that the engine makes, once, against plain torch in float64; and where its kernels come from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend, GpuPlatform
from cascade_llm.attention.flashinfer.kernels import device_arch, kernel_states
from cascade_llm.attention.flashinfer.levels import DecodeKernel
from cascade_llm.attention.flashinfer.ops import FlashInferOps
from cascade_llm.attention.merge_state import merge_state
from cascade_llm.attention.reference import reference_attention
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.validation.attention_error import TOLERANCES, largest_difference
from cascade_llm.validation.cases import CascadeCase, CaseChoices, cascade_case, pool_with_only
from scripts.gpu_suite.machine import Machine
from scripts.gpu_suite.stage import StageRun

__all__ = ["run"]

SHAPES = ((8, 2, 64), (8, 8, 64), (8, 2, 128), (8, 8, 128))
"""(query heads, KV heads, head size)"""
ROWS = 33


class Call(NamedTuple):
    """One call to be compared."""

    name: str
    """The field of `FlashInferOps`, and what it is called for."""
    run: Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]
    """Gives pairs of a result and what is expected."""
    tolerance: float


def run(stage: StageRun) -> dict[str, Any]:
    """See the module."""
    results: list[dict[str, Any]] = []
    kernels = _kernels(stage.machine)
    torch.manual_seed(0)
    with torch.inference_mode():
        platform = stage.machine.platform()
        for call in _calls(stage.machine, platform):
            results.append(_compared(stage.machine, call))
            stage.save(_told(results, kernels))
    return _told(results, kernels)


def _told(results: list[dict[str, Any]], kernels: list[dict[str, str]]) -> dict[str, Any]:
    called = {entry["call"].split(":")[0] for entry in results}
    missing = sorted({field.name for field in fields(FlashInferOps)} - called)
    wrong = [entry["call"] for entry in results if not entry["passed"]]
    return {
        "verdict": "failed" if wrong or missing else "passed",
        "headline": {"calls": len(results), "wrong": wrong, "slowest_first_s": max(r["first_s"] for r in results)},
        "calls": results,
        "never_called": missing,
        "kernels": kernels,
    }


def _compared(machine: Machine, call: Call) -> dict[str, Any]:
    """A call that raises is a result, and the next one comes; an illegal access ends the process."""
    started = time.perf_counter()
    entry: dict[str, Any] = {"call": call.name, "tolerance": call.tolerance, "passed": False}
    try:
        pairs = call.run()
        machine.synchronize()
        entry["error"] = max(largest_difference(found, expected) for found, expected in pairs)
        entry["passed"] = entry["error"] <= call.tolerance
    except Exception as error:
        entry["refused"] = f"{type(error).__name__}: {error}"[:500]
    entry["first_s"] = round(time.perf_counter() - started, 3)
    return entry


def _kernels(machine: Machine) -> list[dict[str, str]]:
    """Every module of kernels: built ahead, prebuilt, or compiled when it was first called."""
    if machine.device.type != "cuda":
        return []
    states: dict[str, dict[str, str]] = {}
    for heads in SHAPES:
        for kernel in kernel_states(_spec(machine, heads), device_arch(machine.device)):
            states[kernel.name] = {"purpose": kernel.purpose, "state": kernel.state.replace("missing", "compiled now")}
    return [{"name": name, **entry} for name, entry in states.items()]


def _calls(machine: Machine, platform: GpuPlatform) -> Iterator[Call]:
    yield from _elementwise(machine, platform.ops)
    for heads in SHAPES:
        yield from _attention(machine, platform, heads)


def _attention(machine: Machine, platform: GpuPlatform, heads: tuple[int, int, int]) -> Iterator[Call]:
    name, tolerance = "{}/{} heads of {}".format(*heads), TOLERANCES[machine.dtype]
    group = (heads[1], heads[0] // heads[1], heads[2])
    kinds: list[tuple[str, bool, DecodeKernel]] = [
        ("BatchPrefillWithPagedKVCacheWrapper", False, "decode_tensor_cores"),
        ("BatchDecodeWithPagedKVCacheWrapper", True, "decode_tensor_cores"),
        ("BatchDecodeWithPagedKVCacheWrapper", True, "decode_cuda_cores"),
    ]
    for call, decode, leaf in kinds:
        choices = CaseChoices(
            page_size=16, num_sequences=8, num_shared_levels=2, heads=group, decode=decode, window=False
        )
        work = _attended(machine, platform, heads, cascade_case(1, choices), leaf)
        yield Call(f"{call}: {name}, {leaf if decode else 'mixed rows'}", work, tolerance)
    yield Call(f"append_paged_kv_cache: {name}", _appended(machine, platform, heads), 0.0)
    yield Call(f"merge_state_in_place: {name}", _merged(machine, platform.ops, heads), tolerance)


def _attended(
    machine: Machine, platform: GpuPlatform, heads: tuple[int, int, int], case: CascadeCase, leaf: DecodeKernel
) -> Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]:
    def work() -> list[tuple[torch.Tensor, torch.Tensor]]:
        spec = _spec(machine, heads)
        pool = pool_with_only(case, num_layers=1, dtype=machine.dtype, seed=1, layout="NHD", device=machine.device)
        q = _drawn(machine, case.plan.num_rows, heads[0], heads[2])
        with platform.stream.active():
            prepared = FlashInferAttentionBackend(spec, pool, platform, leaf).prepare(case.plan)
            found = prepared.attend(0, q)
        expected = reference_attention(case.plan, pool, 0, q, spec.sm_scale)
        return list(zip(found, expected, strict=True))

    return work


def _appended(
    machine: Machine, platform: GpuPlatform, heads: tuple[int, int, int]
) -> Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]:
    def work() -> list[tuple[torch.Tensor, torch.Tensor]]:
        spec = _spec(machine, heads)
        pool = PagedKVCache(
            num_layers=1,
            num_pages=8,
            page_size=16,
            num_kv_heads=heads[1],
            head_dim=heads[2],
            dtype=machine.dtype,
            device=machine.device,
        )
        slots = torch.arange(3, 3 + 2 * ROWS, 2, device=machine.device)
        k, v = (_drawn(machine, ROWS, heads[1], heads[2]) for _ in range(2))
        with platform.stream.active():
            FlashInferAttentionBackend(spec, pool, platform).write(0, k, v, slots.int())
        return list(zip(pool.read(0, slots), (k, v), strict=True))

    return work


def _merged(
    machine: Machine, ops: FlashInferOps, heads: tuple[int, int, int]
) -> Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]:
    def work() -> list[tuple[torch.Tensor, torch.Tensor]]:
        v, v_other = (_drawn(machine, ROWS, heads[0], heads[2]) for _ in range(2))
        s, s_other = (torch.randn(ROWS, heads[0], device=machine.device) for _ in range(2))
        s_other[::3] = -torch.inf  # rows in an empty segment
        v_other[::3] = 0
        expected = merge_state(v.float(), s, v_other.float(), s_other)
        ops.merge_state_in_place(v, s, v_other, s_other)
        return list(zip((v, s), expected, strict=True))

    return work


def _elementwise(machine: Machine, ops: FlashInferOps) -> Iterator[Call]:
    wide = 8 * TOLERANCES[machine.dtype] / 3  # of numbers up to 10

    def norm(*shape: int) -> Callable[[], list[tuple[torch.Tensor, torch.Tensor]]]:
        def work() -> list[tuple[torch.Tensor, torch.Tensor]]:
            x, weight = _drawn(machine, *shape), _drawn(machine, shape[-1])
            return [(ops.rmsnorm(x, weight, 1e-6), _normalized(x.double(), weight.double()))]

        return work

    def gemma_norm() -> list[tuple[torch.Tensor, torch.Tensor]]:
        x, weight = _drawn(machine, ROWS, 256), _drawn(machine, 256)
        return [(ops.gemma_rmsnorm(x, weight, 1e-6), _normalized(x.double(), 1 + weight.double()))]

    def gemma_add_and_norm() -> list[tuple[torch.Tensor, torch.Tensor]]:
        x, residual, weight = _drawn(machine, ROWS, 256), _drawn(machine, ROWS, 256), _drawn(machine, 256)
        total = x.double() + residual.double()
        ops.gemma_fused_add_rmsnorm(x, residual, weight, 1e-6)
        return [(residual, total), (x, _normalized(total, 1 + weight.double()))]

    def add_and_norm() -> list[tuple[torch.Tensor, torch.Tensor]]:
        x, residual, weight = _drawn(machine, ROWS, 256), _drawn(machine, ROWS, 256), _drawn(machine, 256)
        total = x.double() + residual.double()
        ops.fused_add_rmsnorm(x, residual, weight, 1e-6)
        return [(residual, total), (x, _normalized(total, weight.double()))]

    def gate() -> list[tuple[torch.Tensor, torch.Tensor]]:
        x = _drawn(machine, ROWS, 256)
        first, second = x.double().chunk(2, dim=-1)
        return [(ops.silu_and_mul(x), torch.nn.functional.silu(first) * second)]

    def rotate() -> list[tuple[torch.Tensor, torch.Tensor]]:
        positions = torch.arange(ROWS, dtype=torch.int32, device=machine.device) * 7
        angles = torch.arange(7 * ROWS, device=machine.device)[:, None] / 1e4 ** torch.linspace(0, 1, 32).to(
            machine.device
        )
        q, k = (_drawn(machine, ROWS, heads * 64) for heads in (8, 2))
        expected = [_rotated(x.double().view(ROWS, -1, 64), angles[positions.long()].double()) for x in (q, k)]
        table = torch.cat((angles.cos(), angles.sin()), dim=-1).contiguous()
        ops.apply_rope_with_cos_sin_cache_inplace(positions, q, k, 64, table)
        return [(x, y.flatten(1)) for x, y in zip((q, k), expected, strict=True)]

    yield Call("rmsnorm: rows", norm(ROWS, 256), wide)
    yield Call("rmsnorm: heads of 64", norm(ROWS, 8, 64), wide)
    yield Call("rmsnorm: heads of 128", norm(ROWS, 8, 128), wide)
    yield Call("fused_add_rmsnorm: rows", add_and_norm, wide)
    yield Call("gemma_rmsnorm: rows", gemma_norm, wide)
    yield Call("gemma_fused_add_rmsnorm: rows", gemma_add_and_norm, wide)
    yield Call("silu_and_mul: rows", gate, wide)
    yield Call("apply_rope_with_cos_sin_cache_inplace: heads of 64", rotate, TOLERANCES[machine.dtype])


def _normalized(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def _rotated(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """x [rows, heads, size], angles [rows, size / 2]."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _drawn(machine: Machine, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=machine.device).to(machine.dtype)


def _spec(machine: Machine, heads: tuple[int, int, int]) -> AttentionSpec:
    return AttentionSpec(
        num_layers=1,
        num_qo_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=heads[2],
        sm_scale=heads[2] ** -0.5,
        dtype=machine.dtype,
        device=machine.device,
    )
