"""What the machine is: versions, driver, commit, what imports, and what the device can do at best."""

from __future__ import annotations

import hashlib
import importlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from scripts.gpu_suite.machine import known_card, measured_rates
from scripts.gpu_suite.stage import StageRun

__all__ = ["run"]

IMPORTS = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "gguf", "numpy", "xxhash", "click", "rich",
           "psutil", "flashinfer", "tvm_ffi", "triton", "cascade_llm.llm")  # fmt: skip
PACKAGES = ("torch", "flashinfer-python", "flashinfer-jit-cache", "triton", "nvidia-cutlass-dsl", "apache-tvm-ffi")
ROOT = Path(__file__).parents[3]


def run(stage: StageRun) -> dict[str, Any]:
    """See the module."""
    device = stage.machine.device
    facts: dict[str, Any] = {
        "verdict": "measured",
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else stage.machine.card.name,
        "memory_bytes": stage.machine.memory_bytes,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "sources": _digest(),
        "cannot_import": _missing(),
    }
    stage.save(facts)
    bytes_per_s, flops_per_s = measured_rates(stage.machine, stage.sizes.copy_bytes, stage.sizes.matrix_size)
    facts |= {"copy_bytes_per_s": bytes_per_s, "matrix_flops_per_s": flops_per_s, "card": stage.machine.card._asdict()}
    facts["is_known_card"] = known_card(facts["name"]) is not None
    facts["headline"] = {"name": facts["name"], "copy_tb_per_s": bytes_per_s / 1e12, "tflop_per_s": flops_per_s / 1e12}
    return facts


def _said(*command: str) -> str | None:
    """The first line that a program prints; None where it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _digest() -> str:
    """Of the package's sources: what ran, where git cannot tell."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "cascade_llm").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _missing() -> dict[str, str]:
    """The reason for each module that cannot be imported."""
    found = {}
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:300]
    return found
