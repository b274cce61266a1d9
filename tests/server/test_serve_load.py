"""The load test's short form: clients of every kind, a drain, the death of the engine; the script checks each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_no_request_is_lost_and_pages_are_conserved(
    tiny_folder: Path, repo_root: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    sizes = ("--seconds", "20", "--clients", "60", "--json", tmp_path / "figures.json")
    server = ("--option=--dtype=float32", "--option=--num-threads=1", "--option=--max-num-seqs=32")
    command = list(map(str, [sys.executable, "scripts/serve_load.py", "--model", tiny_folder, *sizes, *server]))
    paths = {**environment, "PYTHONPATH": str(repo_root)}
    done = subprocess.run(
        list(map(str, command)), cwd=repo_root, env=paths, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.keys() == {"load", "drain", "kill"}
    ends = figures["load"]["ends"]
    assert {"streams: whole", "streams: left", "is too large: refused", "has a wrong key: refused"} <= ends.keys()
    assert figures["load"]["pages"]["held"] == 0
