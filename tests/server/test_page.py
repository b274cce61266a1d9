"""The page's files and the live view's events, over HTTP from a real server."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import httpx
import pytest

from cascade_llm.server.sharing_feed import MOST_LISTENERS
from tests.patience import PATIENCE_S
from tests.server.conftest import RunningServer, StartServer

EVENTS = "/v1/cascade/events"
SECRET = "The quick brown fox jumps over the lazy dog, and then it does so once more, from the other side of the fence."
SHARED = {"prompt": SECRET, "n": 2, "max_tokens": 100, "temperature": 1, "ignore_eos": True}


@contextmanager
def events(server: RunningServer, **headers: str) -> Iterator[Iterator[dict[str, Any]]]:
    """What a listener is told."""
    with server.client.stream("GET", EVENTS, headers=headers) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        lines = (line for line in answer.iter_lines() if line.startswith("data: "))
        yield (json.loads(line.removeprefix("data: ")) for line in lines)


def policy(answer: httpx.Response) -> dict[str, list[str]]:
    rules = (rule.split() for rule in answer.headers["content-security-policy"].split(";"))
    return {name: values for name, *values in rules}


def test_every_file_is_served_and_nothing_inline_or_from_elsewhere(server: RunningServer) -> None:
    page = server.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    named = set(re.findall(r'(?:src|href)="([^"#]+)"', page.text))
    names = {path.name for path in (files("cascade_llm.server") / "page").iterdir()}
    paths = {f"/page/{name}" for name in names - {"index.html"}}
    assert named <= paths
    for answer in (page, *map(server.get, paths)):
        assert answer.status_code == 200
        rules = policy(answer)
        assert rules["default-src"] == ["'none'"]
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == ["'self'"]
        assert rules["frame-ancestors"] == rules["base-uri"] == ["'none'"]
        assert rules["require-trusted-types-for"] == ["'script'"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://(?!www\.w3\.org)", answer.text)
        for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
            assert way not in answer.text
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page.text)
    for module in (path for path in paths if path.endswith(".js")):
        text = server.get(module).text
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= names
        assert not re.search(r"[{<(|,] *any\b(?!\.)", text), "a type that is any is not checked"


def test_no_page(locked: RunningServer) -> None:
    key = {"authorization": "Bearer first"}
    assert [locked.get(path, **key).status_code for path in ("/", "/page/main.js")] == [404, 404]


def test_events_need_a_key(locked: RunningServer) -> None:
    assert locked.get(EVENTS).status_code == 401
    with events(locked, authorization="Bearer first") as told:
        assert next(told)["engine"] == "ready"


def test_two_sequences_with_one_prefix_are_seen_without_their_text(server: RunningServer) -> None:
    with events(server) as told:
        assert next(told)["engine"] == "ready"
        assert server.post("/v1/completions", SHARED).status_code == 200
        step = next(e["last_step"] for e in told if e["last_step"] and e["last_step"]["kinds"][0]["runs"])
        (run,) = step["kinds"][0]["runs"]
        assert (run["num_sequences"], len(run["own_lens"]), run["num_tokens"] % 16) == (2, 2, 0)
        assert step["kv_bytes_saved"] == run["kv_bytes_saved"] > 0
        assert step["num_levels"] == 2
        assert step["reason"] is None
        assert "text" not in run
        assert "token_ids" not in run
        assert server.post("/v1/completions", {**SHARED, "n": 1, "max_tokens": 2}).status_code == 200
        alone = next(event["last_step"] for event in told if event["last_step"]["num_sequences"] == 1)
        assert (alone["reason"], alone["kinds"][0]["runs"], alone["kv_bytes_saved"]) == ("one sequence", [], 0)


@pytest.mark.slow
def test_text_is_told_where_the_server_is_asked_to(start_server: StartServer) -> None:
    server = start_server("--cascade-shared-prefix-len", "16", "--show-text")
    server.wait_until_ready()
    with events(server) as told:
        body = {**SHARED, "max_tokens": 400, "stream": True}
        with server.client.stream("POST", "/v1/completions", json=body) as answer:
            reading = threading.Thread(target=answer.read)
            reading.start()
            runs = (run for event in told if event["last_step"] for run in event["last_step"]["kinds"][0]["runs"])
            text = next(run["text"] for run in runs if "text" in run)
            reading.join(PATIENCE_S)
    assert text
    assert SECRET.startswith(text)


def test_too_many_listeners_are_refused(server: RunningServer) -> None:
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S, limits=limits) as client:
        answers = [client.send(client.build_request("GET", EVENTS), stream=True) for _ in range(MOST_LISTENERS + 1)]
        assert [answer.status_code for answer in answers] == [200] * MOST_LISTENERS + [429]
        for answer in answers:
            answer.close()
        server.wait_for(lambda: _is_taken(client))


def _is_taken(client: httpx.Client) -> bool:
    with client.stream("GET", EVENTS) as answer:
        return answer.status_code == 200
