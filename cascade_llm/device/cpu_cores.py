"""How many cores this process may use: physical ones, within its affinity and its control group's limit."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

__all__ = ["usable_cores"]


def usable_cores(system: Path = Path("/sys"), process: Path = Path("/proc/self")) -> int:
    """At least 1. Hyperthreads of one core count once: they share the units that multiply.

    Args:
        system, process: where the system tells of its processors and of this process; for tests
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = affinity(0) if affinity else range(psutil.cpu_count(logical=False) or 1)
    cores = {_siblings(system / "devices" / "system" / "cpu" / f"cpu{cpu}", cpu) for cpu in cpus}
    return max(1, min(len(cores), _group_limit(system / "fs" / "cgroup", process)))


def _siblings(folder: Path, cpu: int) -> str:
    """The same text for hyperthreads of one core."""
    try:
        return (folder / "topology" / "thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _group_limit(mount: Path, process: Path) -> int:
    """Processors that the control group's quota comes to, rounded up; the strictest from this process's group up."""
    try:
        own = [line.split(":", 2)[2].lstrip("/") for line in (process / "cgroup").read_text().split() if ":" in line]
    except OSError:
        own = []
    folders = {mount, mount / "cpu"}
    for group in own:
        for root in (mount, mount / "cpu"):
            folders |= {root / group, *(path for path in (root / group).parents if path.is_relative_to(mount))}
    return min(math.ceil(_quota(folder)) if _quota(folder) < math.inf else 2**31 for folder in folders)


def _quota(folder: Path) -> float:
    """Processors' worth of time that one group gives; infinite where it names none. Both versions of control groups."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
