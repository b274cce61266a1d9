"""Run a program to its end, unless it hangs: judged by what it computes, not by the clock.

On a loaded machine a compiler may take ten times its time, and still it is at work. Standard library only: the build
of the wheel reads this too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade_llm.errors import BackendError

__all__ = ["Patience", "run_watched"]

LEAST_SHARE = 0.005
"""Of a processor; a program that takes less waits for something, or only looks whether that has come."""
POLL_S = 1.0


@dataclass(frozen=True)
class Patience:
    """How long a program may take.

    Attributes:
        idle_s: by the clock, without computing; where the system does not tell what it computed, in all
        computing_s: of processor time, with the programs that it started
    """

    idle_s: float
    computing_s: float


def run_watched(
    command: Sequence[str], patience: Patience, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit status of a program, and what it wrote; whatever ends the wait ends the programs that it has started too.

    Raises:
        BackendError: it was ended, because `patience` was at its end
        OSError: it cannot be started
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    with process:
        try:
            return _watch(process, command[0], patience)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _watch(process: subprocess.Popen[bytes], name: str, patience: Patience) -> tuple[int, str]:
    moved_at, moved_s = time.monotonic(), 0.0
    while True:
        try:
            output, _ = process.communicate(timeout=min(POLL_S, patience.idle_s / 5))
        except subprocess.TimeoutExpired:
            computed_s = sum(_session_seconds(process.pid))
        else:
            return process.returncode, output.decode(errors="replace")
        if computed_s > patience.computing_s:
            raise BackendError(f"{name} was ended after {computed_s:.0f} s of computing")
        if computed_s - moved_s > LEAST_SHARE * patience.idle_s:
            moved_at, moved_s = time.monotonic(), computed_s
        elif time.monotonic() - moved_at > patience.idle_s:
            raise BackendError(f"{name} was ended after {patience.idle_s:.0f} s without computing")


def _session_seconds(session: int) -> Iterator[float]:
    """Processor time of each process of a session and of its children that have ended; nothing where none is told."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # after the name in parentheses: state, parent, group, session
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended since
            continue
        if int(fields[3]) == session:
            yield sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
