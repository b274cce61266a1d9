"""Real servers: the command in a process of its own, with a tiny model and a real tokenizer."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import httpx
import pytest

from tests.cli.conftest import environment, process_args, run, run_process, tiny_folder
from tests.patience import PATIENCE_S

__all__ = ["environment", "run", "run_process", "started", "tiny_folder"]

ONE_REQUEST_EACH = httpx.Limits(max_keepalive_connections=0)
"""For connections. The client is kept: making one reads certificates, ten times the work of a request."""
Result = TypeVar("Result")


class RunningServer:
    """A server's process, where it listens, and what it has written to standard error."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: list[str] = []
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()
        (self.url,) = self.wait_for(lambda: re.findall(r"listening on (\S+)", self.log))[:1]
        self.client = httpx.Client(base_url=self.url, timeout=PATIENCE_S, limits=ONE_REQUEST_EACH)

    @property
    def log(self) -> str:
        return "".join(self._lines)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.client.get(path, headers=headers)

    def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return self.client.post(path, json=body, headers=headers)

    def post_text(self, path: str, text: str) -> httpx.Response:
        """JSON as it is written."""
        return self.client.post(path, content=text, headers={"content-type": "application/json"})

    def end(self) -> int:
        """Wait until it has ended; returns its exit status."""
        status = self.process.wait(PATIENCE_S)
        self._reading.join(PATIENCE_S)
        return status

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: self.get("/ready").status_code == 200)

    def metric(self, name: str, **headers: str) -> float:
        text = self.get("/metrics", **headers).text
        found = re.search(rf"^cascade_llm_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found is not None, name
        return float(found[1])

    def wait_for(self, ask: Callable[[], Result], patience_s: float = PATIENCE_S) -> Result:
        end = time.monotonic() + patience_s
        while not (result := ask()):
            assert self.process.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.01)
        return result

    def _read(self) -> None:
        assert self.process.stderr is not None
        with suppress(ValueError):  # closed at the end
            self._lines += iter(self.process.stderr.readline, "")


StartServer = Callable[..., "RunningServer"]


@contextmanager
def started(*args: str | Path, repo_root: Path, environment: dict[str, str]) -> Iterator[RunningServer]:
    options = ("--port", "0", "--dtype", "float32", "--num-threads", "1", "--max-num-seqs", "8", "--page-size", "16")
    process = subprocess.Popen(
        process_args("serve", *args, *options), cwd=repo_root, env=environment, stderr=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield RunningServer(process)
        finally:
            process.kill()


@pytest.fixture(scope="session")
def server(tiny_folder: Path, repo_root: Path, environment: dict[str, str]) -> Iterator[RunningServer]:
    """One that all tests share."""
    options = ("--served-model-name", "tiny", "--max-queue", "8", "--cascade-shared-prefix-len", "16")
    with started(tiny_folder, *options, repo_root=repo_root, environment=environment) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture(scope="session")
def locked(
    tiny_folder: Path, repo_root: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """One that all tests share and that refuses much: it has keys and limits, is strict, and has no page."""
    keys = tmp_path_factory.mktemp("locked") / "keys"
    keys.write_text("second\nthird\n")
    guards = ("--api-key", "first", "--api-key-file", keys, "--strict", "--no-page", "--allow-chat-templates")
    limits = ("--max-body-bytes", "4000", "--max-output-len", "6", "--max-prompt-len", "99")
    with started(
        tiny_folder, "--served-model-name", "tiny", *guards, *limits, repo_root=repo_root, environment=environment
    ) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def start_server(tiny_folder: Path, repo_root: Path, environment: dict[str, str]) -> Iterator[StartServer]:
    """Start one with these options, for one test."""
    with ExitStack() as running:

        def start(*args: str) -> RunningServer:
            return running.enter_context(started(tiny_folder, *args, repo_root=repo_root, environment=environment))

        yield start
