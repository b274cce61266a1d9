"""The API against what /openapi.json says of it: cases made from the document, answers compared with it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import RunningServer, StartServer

ENDLESS = "/v1/cascade/events"
REFUSED = "/v1/embeddings"
"""Answers 501, which is a server's error and meant."""
UNCHECKED = "positive_data_acceptance"
"""The document tells types, not how fields limit each other, nor the context's length."""


def fuzz(server: RunningServer, folder: Path, *args: str) -> None:
    """Run schemathesis's command; fails with what it found."""
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    assert program is not None
    options = ["--exclude-path", ENDLESS, "--exclude-path", REFUSED, "--exclude-checks", UNCHECKED]
    shown = ["--no-color", "--warnings", "off", "--continue-on-failure", "--no-shrink", "--request-timeout", "60"]
    command = [program, "run", f"{server.url}/openapi.json", *options, *shown, *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
    assert "No issues found" in done.stdout, done.stdout
    assert "Traceback" not in server.log
    assert " failed: " not in server.log


def test_answers_are_those_that_the_document_tells(server: RunningServer, tmp_path: Path) -> None:
    fuzz(server, tmp_path, "--phases", "fuzzing", "--max-examples", "2", "--seed", "1")


@pytest.mark.slow
def test_all_that_can_be_made_from_the_document(start_server: StartServer, tmp_path: Path) -> None:
    server = start_server("--api-key", "right", "--served-model-name", "tiny")
    server.wait_until_ready()
    key = ("--header", "Authorization: Bearer right")
    fuzz(server, tmp_path, *key, "--phases", "coverage,fuzzing,stateful", "--max-examples", "60")
    metrics = server.get("/metrics", authorization="Bearer right").text
    assert 'cascade_llm_pages{state="held"} 0.0' in metrics


def test_the_document_tells_of_keys_and_of_no_other_errors(server: RunningServer, locked: RunningServer) -> None:
    open_document = server.get("/openapi.json").json()
    assert "securitySchemes" not in open_document["components"]
    document = locked.get("/openapi.json", authorization="Bearer first").json()
    assert document["security"] == [{"bearer": []}, {"key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            wants_key = operation.get("security") != []
            assert wants_key == ("401" in operation["responses"]) == (path not in ("/health", "/ready"))
            assert "422" not in operation["responses"]
            for status, response in operation["responses"].items():
                assert response["content"], (path, status)
    events = document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert events.keys() == {"application/json", "text/event-stream"}
