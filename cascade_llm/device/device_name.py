"""What a device calls itself."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

__all__ = ["device_name", "last_level_cache_bytes"]


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's as the kernel tells it; its architecture where it does not."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def last_level_cache_bytes(device: torch.device) -> int:
    """The last-level cache that one core or the GPU has; 0 where the system does not tell."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text[:-1].isdigit() and text[-1] in "KM":
            sizes.append(int(text[:-1]) << (10 if text[-1] == "K" else 20))
    return max(sizes, default=0)
