"""Run stages one after another, each in a process of its own: what one of them breaks costs that one alone.

Standard library only: nothing here touches a GPU, so an illegal access or a hang in a stage leaves this process whole.
A stage writes OUT/NAME.json when it ends and whenever it has something; after it `OUT/summary.json` says how it ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["MAX_FILES", "Runner", "Stage", "pack", "save_json"]

LEAST_S = 3.0
"""A stage that would get less is not begun."""
GRACE_S = 5.0
"""Between the request to end and the signal that cannot be refused."""
TAIL_CHARACTERS = 4000
MAX_FILES = 8
"""As many come back from the machine."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process."""

    name: str
    limit_s: float
    about: str
    """What it tells, in one line."""
    module: str = ""
    """What is run with `python -m`; it gets the stage's name, its file and its seconds."""
    environment: Mapping[str, str] = field(default_factory=dict)
    wrapper: tuple[str, ...] = ()
    """A program, with its options, that runs the process."""
    optional: bool = False
    """Run only where it is named."""


class Runner:
    """Runs stages until the budget is spent."""

    def __init__(self, out: Path, budget_s: float, options: Sequence[str] = ()) -> None:
        """Begin the summary.

        Args:
            out: takes the results
            budget_s: for all stages together
            options: handed to every stage
        """
        self._out, self._options = out, list(options)
        self._started = time.perf_counter()
        self._ends = self._started + budget_s
        self.summary: dict[str, Any] = {"machine": {}, "budget_s": budget_s, "seconds": 0.0, "stages": {}}
        out.mkdir(parents=True, exist_ok=True)

    def run(self, stages: Sequence[Stage]) -> dict[str, Any]:
        """Run them in order; returns the summary, which is also in OUT/summary.json after each."""
        for stage in stages:
            print(f"stage {stage.name}: {stage.about} ...", flush=True)
            entry = self._run(stage)
            self.summary["stages"][stage.name] = entry
            self.summary["seconds"] = round(time.perf_counter() - self._started, 1)
            save_json(self._out / "summary.json", self.summary)
            print(f"stage {stage.name}: {entry['verdict']}, {entry['ended']}, {entry['seconds']} s", flush=True)
        return self.summary

    def _run(self, stage: Stage) -> dict[str, Any]:
        file, limit_s = self._out / f"{stage.name}.json", min(stage.limit_s, self._ends - time.perf_counter())
        if limit_s < LEAST_S:
            return {"verdict": "not run", "ended": "no time left", "seconds": 0.0}
        if stage.wrapper and shutil.which(stage.wrapper[0]) is None:
            return {"verdict": "not run", "ended": f"{stage.wrapper[0]} is not on the PATH", "seconds": 0.0}
        file.unlink(missing_ok=True)
        started = time.perf_counter()
        command = [*stage.wrapper, sys.executable, "-m", stage.module, stage.name, str(file), f"{limit_s:.1f}"]
        ended, tail = _run_process([*command, *self._options], stage.environment, limit_s)
        result = _read(file)
        if result is None and ended == "finished":
            ended = "wrote nothing"
        result = result or {}
        if stage.name == "machine":
            self.summary["machine"] = result
        entry = {
            "verdict": result.get("verdict", "passed") if ended == "finished" else "failed",
            "ended": ended,
            "seconds": round(time.perf_counter() - started, 1),
            "headline": result.get("headline", {}),
        }
        if entry["verdict"] == "failed":
            entry["output_tail"] = tail
        save_json(file, {"stage": stage.name, **entry, "machine": self.summary["machine"], "result": result})
        return entry


def _run_process(command: Sequence[str], environment: Mapping[str, str], limit_s: float) -> tuple[str, str]:
    """How a process ended, and the end of what it said, on its standard error too."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, **environment}, process_group=0
        )
        try:
            status = process.wait(limit_s)
            ended = "finished" if status == 0 else _told(status)
        except subprocess.TimeoutExpired:
            ended = f"ran past its {limit_s:.0f} s"
        finally:
            _end(process)
        said.seek(max(0, said.seek(0, os.SEEK_END) - TAIL_CHARACTERS))
        return ended, said.read().decode(errors="replace")


def _told(status: int) -> str:
    return f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it started; one in a kernel that never ends dies by the second signal alone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def save_json(path: Path, content: Any) -> None:
    """Write a file that is whole at any time."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.new")
    scratch.write_text(json.dumps(content, indent=1))
    scratch.replace(path)


def pack(out: Path) -> None:
    """Where there are more files than come back, put all but the summary into OUT/stages.tar.gz."""
    files = [path for path in sorted(out.iterdir()) if path.is_file()]
    if len(files) <= MAX_FILES:
        return
    with tarfile.open(out / "stages.tar.gz", "w:gz") as tar:
        for path in files:
            if path.name != "summary.json":
                tar.add(path, path.name)
    for path in files:
        if path.name != "summary.json":
            path.unlink()
