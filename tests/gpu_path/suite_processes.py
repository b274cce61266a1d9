"""Stages that end badly, for the tests of the runner: `python -m tests.gpu_path.suite_processes NAME FILE SECONDS`."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from scripts.gpu_suite.runner import save_json


def main() -> None:
    name, file = sys.argv[1], Path(sys.argv[2])
    if name == "works":
        save_json(file, {"verdict": "passed", "headline": {"environment": os.environ.get("OF_THE_STAGE")}})
    elif name == "crashes":
        save_json(file, {"verdict": "passed", "so_far": 1})
        print("an illegal memory access was encountered", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    elif name == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("waiting for the device", file=sys.stderr, flush=True)
        time.sleep(600)
    elif name == "raises":
        raise RuntimeError("no kernel image")
    elif name == "says_no":
        save_json(file, {"verdict": "failed"})


if __name__ == "__main__":
    main()
