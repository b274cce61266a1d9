"""A server whose engine has two ranks: what is told when a process dies, and that none outlives the others."""

from __future__ import annotations

import json
import signal

import psutil
import pytest

from tests.cli.conftest import RunProcess
from tests.patience import PATIENCE_S
from tests.server.conftest import RunningServer, StartServer
from tests.server.test_life_cycle import COMPLETIONS, LONG, begin_stream, engine_of

RANKS = ("--tensor-parallel-size", "2")


def processes_of(server: RunningServer) -> list[psutil.Process]:
    """All that the server has started, and what these have."""
    return psutil.Process(server.process.pid).children(recursive=True)


def ranks_of(server: RunningServer) -> list[psutil.Process]:
    children = engine_of(server).children()
    return [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]


@pytest.mark.slow
def test_a_rank_that_dies_is_told_and_sigterm_lets_requests_end(start_server: StartServer) -> None:
    server = start_server(*RANKS, "--restarts", "1")
    server.wait_until_ready()
    engine, ranks = engine_of(server), ranks_of(server)
    assert len(ranks) == 2
    thread, lines = begin_stream(server)
    ranks[1].kill()
    thread.join(PATIENCE_S)
    said = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    (error,) = [event["error"] for event in said if "error" in event]
    assert "process" in error["message"]
    health = server.get("/health")
    assert health.status_code == 503 or health.json() == {"status": "starting"}
    server.wait_until_ready()
    assert psutil.wait_procs([engine, *ranks], PATIENCE_S)[1] == []
    assert server.post(COMPLETIONS, {**LONG, "max_tokens": 3}).json()["usage"]["completion_tokens"] == 3
    after = processes_of(server)
    thread, lines = begin_stream(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    thread.join(PATIENCE_S)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert '"finish_reason":"length"' in lines[-4]
    assert psutil.wait_procs(after, PATIENCE_S)[1] == []


@pytest.mark.slow
@pytest.mark.parametrize("who", ["api", "engine", "rank"])
def test_nothing_outlives_what_is_killed(start_server: StartServer, who: str) -> None:
    server = start_server(*RANKS)
    server.wait_until_ready()
    processes = processes_of(server)
    assert len(processes) >= 3
    victim = {"api": psutil.Process(server.process.pid), "engine": engine_of(server), "rank": ranks_of(server)[0]}[who]
    thread, lines = begin_stream(server) if who == "rank" else (None, [])
    victim.kill()
    assert server.end() == (-signal.SIGKILL if who == "api" else 1)
    if thread is not None:
        thread.join(PATIENCE_S)
        assert any('"error"' in line for line in lines)
    assert psutil.wait_procs(processes, PATIENCE_S)[1] == []


@pytest.mark.slow
def test_bench_serve_measures_it(start_server: StartServer, run_process: RunProcess) -> None:
    server = start_server(*RANKS)
    server.wait_until_ready()
    load = ("--prefix-len", "40", "--num-requests", "4", "--suffix-len", "4", "--output-len", "6", "--repeat", "1")
    done = run_process("bench", "serve", "shared-prefix", *load, "--url", server.url, "--vocab-size", "1000", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
