"""Keys, signals, and the death of the engine, as a client and an operator see them."""

from __future__ import annotations

import json
import signal
import threading

import httpx
import openai
import psutil
import pytest

from tests.cli.conftest import RunProcess
from tests.patience import PATIENCE_S
from tests.server.conftest import RunningServer, StartServer

LONG = {"prompt": "a", "max_tokens": 400, "ignore_eos": True}
COMPLETIONS, EVENTS = "/v1/completions", "/v1/cascade/events"


def engine_of(server: RunningServer) -> psutil.Process:
    """The engine process: the child that has started none."""
    children = psutil.Process(server.process.pid).children()
    (engine,) = [child for child in children if "resource_tracker" not in " ".join(child.cmdline())]
    return engine


def begin_stream(server: RunningServer) -> tuple[threading.Thread, list[str]]:
    """A streaming client in a thread; returns when the first piece has come, with the lines that come."""
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = {**LONG, "stream": True}
        with server.client.stream("POST", COMPLETIONS, json=body) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                begun.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(PATIENCE_S)
    return thread, lines


def test_keys(locked: RunningServer) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    for wrong in ({}, {"authorization": "Bearer nope"}, {"authorization": "Basic first"}, {"authorization": "Bearer"}):
        answer = locked.post(COMPLETIONS, body, **wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert locked.get("/metrics", **wrong).status_code == 401
    for key in ("first", "second", "third"):
        with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=key, max_retries=0) as client:
            assert client.completions.create(model=client.models.list().data[0].id, **body).choices
    assert locked.get("/health").status_code == 200
    assert "first" not in locked.log
    answer = locked.get("/version", authorization="Bearer first", **{"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    locked.wait_for(lambda: "mine-1 GET /version 200" in locked.log)


def test_sigterm_lets_requests_end(start_server: StartServer) -> None:
    server = start_server("--step-timeout", "0.001")  # many a step takes longer
    server.wait_until_ready()
    engine = engine_of(server)
    assert server.get("/health").json() == {"status": "ok"}
    thread, lines = begin_stream(server)
    stalled = server.wait_for(lambda: next((h for h in [server.get("/health")] if h.status_code == 503), None))
    assert stalled.json()["status"] == "stalled"
    with server.client.stream("GET", EVENTS) as listened:
        told = listened.iter_lines()
        next(told)
        server.process.send_signal(signal.SIGTERM)
        for _ in told:  # a listener does not keep the server from ending, and its stream ends whole
            pass
    assert server.end() == 0
    thread.join(PATIENCE_S)
    assert lines[-2:] == ["data: [DONE]", ""]
    assert '"finish_reason":"length"' in lines[-4]
    assert not engine.is_running()
    with pytest.raises(httpx.ConnectError):
        server.get("/health")


@pytest.mark.slow
def test_a_drain_has_an_end(start_server: StartServer) -> None:
    server = start_server("--drain-timeout", "0")
    server.wait_until_ready()
    thread, lines = begin_stream(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.end() == 0
    thread.join(PATIENCE_S)
    said = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "shutting down" in said[-1]["error"]["message"]


def test_a_dead_engine_is_told_and_started_again(start_server: StartServer) -> None:
    server = start_server("--restarts", "1")
    server.wait_until_ready()
    thread, lines = begin_stream(server)
    engine_of(server).kill()
    thread.join(PATIENCE_S)
    (error,) = [json.loads(line.removeprefix("data: "))["error"] for line in lines if '"error"' in line]
    assert "killed by signal 9" in error["message"]
    health = server.get("/health")
    assert health.status_code == 503 or health.json() == {"status": "starting"}
    refused = server.post(COMPLETIONS, LONG)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    server.wait_until_ready()
    assert server.post(COMPLETIONS, {**LONG, "max_tokens": 3}).json()["usage"]["completion_tokens"] == 3
    assert server.metric("engine_restarts") == 1
    engine_of(server).kill()
    assert server.end() == 1
    assert "Error: the engine process has ended (killed by signal 9)" in server.log


def test_a_model_that_is_not_there_ends_the_server(run_process: RunProcess) -> None:
    done = run_process("serve", "/no/such/model", "--port", "0")
    assert done.returncode == 1
    assert "/no/such/model" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(run_process: RunProcess, server: RunningServer) -> None:
    done = run_process("serve", "smollm2", "--port", server.url.rsplit(":", 1)[1])
    assert done.returncode == 1
    assert "--port" in done.stderr


@pytest.mark.slow
def test_a_request_has_its_time_and_a_page_its_origin(start_server: StartServer) -> None:
    server = start_server("--request-timeout", "0.02", "--allow-origin", "https://a.example")
    server.wait_until_ready()
    answer = server.post(COMPLETIONS, LONG, origin="https://a.example")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "request_timeout")
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in server.get("/version", origin="https://b.example").headers
    streamed = server.post(COMPLETIONS, {**LONG, "stream": True})
    assert '"request_timeout"' in streamed.text
    assert "[DONE]" not in streamed.text
    server.wait_for(lambda: server.metric('pages{state="held"}') == 0)
    paths = server.get("/openapi.json").json()["paths"]
    assert {COMPLETIONS, "/v1/chat/completions", "/metrics"} <= paths.keys()
