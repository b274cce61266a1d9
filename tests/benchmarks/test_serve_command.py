"""The comparison of servers: ours started, measured at two rates, and ended."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run

SMALL = ("--prefix-len", "40", "--num-requests", "3", "--suffix-len", "4", "--output-len", "6", "--repeat", "1")


@pytest.mark.slow
def test_our_server_is_started_and_measured(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    engine = ("--dtype", "float32", "--num-threads", "1", "--max-num-seqs", "4", "--kv-cache-gib", "1")
    paces = ("--request-rate", "50", "--request-rate", "100", "--slo-ttft", "60000", "--output", output)
    result = run("serve", "shared-prefix", "-m", tiny_folder, *SMALL, *engine, *paces)
    assert result.exit_code == 0, result.output
    reports = json.loads(output.read_text())["reports"]
    assert [report["arrivals"]["per_s"] for report in reports] == [50, 100]
    for report in reports:
        (measured,) = report["runs"]["cascade-llm"]
        assert measured["counters"] == {"requests": 3, "failed": 0, "in_time": 3}


def test_an_engine_and_its_program_belong_together(run: Run) -> None:
    for args in (["--against", "vllm"], ["--program", sys.executable]):
        result = run("serve", "shared-prefix", *args)
        assert result.exit_code == 2
        assert "belong together" in result.output
