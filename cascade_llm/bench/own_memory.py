"""The most memory that this process has held, since it was last asked to forget."""

from __future__ import annotations

import resource
from pathlib import Path

__all__ = ["forget_peak", "peak_bytes"]

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"
"""proc(5): what sets VmHWM back to the present size."""


def forget_peak() -> None:
    """Begin anew with what is held now; without effect where the system is not Linux."""
    try:
        CLEAR.write_text(FORGET_PEAK)
    except OSError:
        return


def peak_bytes() -> int:
    """Resident memory at its largest since `forget_peak`; where the system is not Linux, since the start."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
