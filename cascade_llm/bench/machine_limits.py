"""What the machine can do at most: bytes per second from memory, flops per second of large products.

Both are measured, in a second or two, and the best that was ever seen is kept in the user's cache folder for this
processor, dtype and number of threads: what else ran at the time can only lower a reading. They are the speeds that a
roofline is drawn with: real, not the data sheet's.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cascade_llm.device.device_name import device_name
from cascade_llm.device.devices import thread_limit
from cascade_llm.device.user_cache import cache_folder
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightOptions
from cascade_llm.weights.linear import Linear
from cascade_llm.worker.memory import available_bytes

__all__ = ["MachineLimits", "machine_limits", "measure_limits"]

SPEEDS = ("bytes_per_s", "flops_per_s", "linear_flops_per_s")
READ_BYTES = 512 << 20
"""Beyond any cache; less where memory is short."""
PRODUCT_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Of square products, whichever is fastest."""
MEASURE_S = 0.4
"""For each of the two, at least."""


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """The best of several readings of each."""

    device: str
    dtype: str
    num_threads: int
    bytes_per_s: float
    """Read from memory, or read and written by a copy, whichever is faster."""
    flops_per_s: float
    """Of a large matrix product in `dtype`; what attention is held to."""
    linear_flops_per_s: float
    """As `flops_per_s`, of products with weights: where they are quantized, of integers if those are faster."""
    torch_version: str


def machine_limits(
    device: torch.device, dtype: torch.dtype, *, num_threads: int | None = None, with_integers: bool = False
) -> MachineLimits:
    """Measure the limits, and take for each the best of this and earlier measurements.

    Args:
        with_integers: whether weights are quantized: products with them are faster on most processors
    """
    path = cache_folder() / "machine_limits.json"
    limits = measure_limits(device, dtype, num_threads=num_threads, with_integers=with_integers)
    numbers = f"{limits.dtype} and int8" if with_integers else limits.dtype
    key = f"{limits.device}, {limits.num_threads} threads, {numbers}, torch {limits.torch_version}"
    kept = _read(path)
    before = kept.get(key)
    if isinstance(before, dict):
        limits = replace(limits, **{name: max(getattr(limits, name), float(before.get(name, 0))) for name in SPEEDS})
    _write(path, {**kept, key: asdict(limits)})
    return limits


def measure_limits(
    device: torch.device, dtype: torch.dtype, *, num_threads: int | None = None, with_integers: bool = False
) -> MachineLimits:
    """Measure both, now."""
    with torch.inference_mode(), thread_limit(num_threads):
        flops_per_s = _flops_per_s(device, dtype, MEASURE_S, None)
        has_integers = with_integers and device.type == "cpu"
        integers_per_s = _flops_per_s(device, dtype, MEASURE_S, "q8_0") if has_integers else 0.0
        return MachineLimits(
            device=device_name(device),
            dtype=str(dtype).removeprefix("torch."),
            num_threads=torch.get_num_threads(),
            bytes_per_s=_bytes_per_s(device, MEASURE_S),
            flops_per_s=flops_per_s,
            linear_flops_per_s=max(flops_per_s, integers_per_s),
            torch_version=torch.__version__,
        )


def _bytes_per_s(device: torch.device, measure_s: float) -> float:
    num_bytes = min(READ_BYTES, available_bytes(device) // 8) // 8 * 8
    source = torch.ones(num_bytes // 8, dtype=torch.int64, device=device)  # adding up integers keeps pace with memory
    target = torch.empty_like(source)
    read = num_bytes / _best_s(lambda: source.sum(), device, measure_s / 2)
    copied = 2 * num_bytes / _best_s(lambda: target.copy_(source), device, measure_s / 2)
    return max(read, copied)


def _flops_per_s(device: torch.device, dtype: torch.dtype, measure_s: float, quantization: str | None) -> float:
    sizes, rates = PRODUCT_SIZES[device.type], []
    for size in sizes:
        x = torch.randn(size, size, device=device).to(dtype)
        options = WeightOptions(dtype=dtype, device=device, quantization=quantization)
        linear = Linear(MatrixSpec("product", size, {"all": size}, options))
        linear.load("all", StoredTensor.plain(x))
        rates.append(2 * size**3 / _best_s(functools.partial(linear, x), device, measure_s / len(sizes)))
    return max(rates)


def _best_s(work: Callable[[], object], device: torch.device, measure_s: float) -> float:
    """The shortest time of several runs, after one that is not counted."""
    work()
    best, end = float("inf"), time.perf_counter() + measure_s
    while best == float("inf") or time.perf_counter() < end:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _write(path: Path, kept: dict[str, Any]) -> None:
    """Whole or not at all; a folder that cannot be written costs a measurement next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(kept, indent=2), encoding="utf-8")
        partial.replace(path)
    except OSError:
        pass
