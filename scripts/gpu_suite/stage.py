"""One stage, in the process that is made for it: `python -m scripts.gpu_suite.stage NAME FILE SECONDS [options]`."""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.gpu_suite.machine import Machine
from scripts.gpu_suite.runner import save_json
from scripts.gpu_suite.sizes import FULL, QUICK, Sizes

__all__ = ["StageRun"]

MODULES = {"sanitizer": "smoke", "blocking": "engine"}
"""Stages that run another one's module."""
KEPT_SHARE = 0.1
"""Of a stage's time, to end in."""


@dataclass(frozen=True)
class StageRun:
    """What a stage is given."""

    name: str
    machine: Machine
    sizes: Sizes
    folder: Path
    """Where the stages' files are."""
    scratch: Path
    """For files that are not wanted afterwards."""
    save: Callable[[dict[str, Any]], None]
    """Writes what there is so far: it is what remains if the process is ended."""
    ends: float
    """On `time.perf_counter`."""

    def has_time(self, seconds: float = 0.0) -> bool:
        """Whether something that takes so long may still be begun."""
        return time.perf_counter() + seconds < self.ends


def main() -> None:
    """Run a stage; what it raises ends the process, and its traceback goes to the parent."""
    started = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("file", type=Path)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--machine", default="scripts.gpu_suite.machine:CudaMachine")
    arguments = parser.parse_args()
    module, _, kind = arguments.machine.partition(":")
    run = importlib.import_module(f"scripts.gpu_suite.stages.{MODULES.get(arguments.name, arguments.name)}").run
    machine: Machine = getattr(importlib.import_module(module), kind)()
    with tempfile.TemporaryDirectory() as scratch:
        stage = StageRun(
            name=arguments.name,
            machine=machine,
            sizes=machine.sizes if machine.sizes else QUICK if arguments.quick else FULL,
            folder=arguments.file.parent,
            scratch=Path(scratch),
            save=lambda result: save_json(arguments.file, result),
            ends=started + arguments.seconds * (1 - KEPT_SHARE),
        )
        stage.save(run(stage))


if __name__ == "__main__":
    main()
