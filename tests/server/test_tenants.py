"""Tenants, quotas and turns of a real server with a file of keys."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.patience import PATIENCE_S
from tests.server.conftest import RunningServer, started

COMPLETIONS, SESSIONS, EVENTS = "/v1/completions", "/v1/sessions", "/v1/cascade/events"
KEYS = """
keys:
  - {key: k-alice, name: alice, tenant: acme}
  - {key: k-amy, name: amy, tenant: acme}
  - {key: k-bob, name: bob, tenant: other}
  - {key: k-ops, name: ops}
  - {key: k-one, name: one, max_concurrent: 1}
  - {key: k-few, name: few, tenant: few, tokens_per_minute: 300, requests_per_minute: 100,
     most_urgent_priority: 5}
  - {key: k-tiny, name: tiny, tenant: tiny}
tenants:
  - {name: tiny, cache_share: 0.04}
"""
LONG = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(
    tiny_folder: Path, repo_root: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(KEYS)
    with started(
        tiny_folder, "--api-key-file", str(path), "--show-text", repo_root=repo_root, environment=environment
    ) as running:
        running.wait_for(lambda: running.get("/ready").status_code == 200)
        yield running


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer k-{name}"}


def ask(server: RunningServer, name: str, **body: Any) -> httpx.Response:
    return server.post(COMPLETIONS, {"max_tokens": 2, **body}, **bearer(name))


def cached(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


@contextmanager
def streaming(server: RunningServer, name: str, **body: Any) -> Iterator[None]:
    """A stream whose first piece has come, and that is left at the end."""
    whole = {**LONG, **body, "stream": True}
    with server.client.stream("POST", COMPLETIONS, json=whole, headers=bearer(name)) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()  # kept: the connection ends with it
        next(lines)
        yield


def event(server: RunningServer, name: str) -> dict[str, Any]:
    """The next event of the live view."""
    with server.client.stream("GET", EVENTS, headers=bearer(name)) as answer:
        line = next(line for line in answer.iter_lines() if line.startswith("data: "))
    told: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return told


def test_the_page_needs_no_key(server: RunningServer) -> None:
    assert server.get("/").status_code == 200


def test_prompts_of_a_tenant_are_cached_for_its_keys_alone(server: RunningServer) -> None:
    prompt = list(range(100, 150))
    assert cached(ask(server, "alice", prompt=prompt)) == 0
    assert [cached(ask(server, name, prompt=prompt)) for name in ("bob", "ops", "amy", "alice")] == [0, 0, 48, 48]
    assert [cached(ask(server, "amy", prompt=prompt, cache_salt="mine")) for _ in range(2)] == [0, 48]
    message = {"messages": [{"role": "user", "content": "pages " * 30}], "max_tokens": 1, "cache_salt": "mine"}
    usages = [server.post("/v1/messages", message, **bearer(name)).json()["usage"] for name in ("amy", "amy", "bob")]
    assert [usage["cache_read_input_tokens"] > 0 for usage in usages] == [False, True, False]
    wrong = ask(server, "amy", prompt=prompt, cache_salt="")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "cache_salt")


def test_a_session_is_its_tenant_s(server: RunningServer) -> None:
    assert ask(server, "alice", prompt=list(range(200, 250)), session_id="talk").status_code == 200

    def listed(name: str) -> tuple[list[str], int]:
        told = server.get(SESSIONS, **bearer(name)).json()
        return [item["id"] for item in told["data"]], told["held_pages"]

    def drop(name: str) -> int:
        return server.client.delete(f"{SESSIONS}/talk", headers=bearer(name)).status_code

    assert [listed(name) for name in ("amy", "bob", "ops")] == [(["talk"], 3), ([], 0), ([], 0)]
    assert [drop("bob"), drop("ops"), drop("amy"), drop("alice")] == [404, 404, 200, 404]


def test_the_live_view_and_groups_are_a_tenant_s_own(server: RunningServer) -> None:
    prompts = [list(range(150, 214))] * 60
    with streaming(server, "alice", prompt=prompts), streaming(server, "bob", prompt=prompts):
        own, other, nobody = (event(server, name) for name in ("amy", "bob", "ops"))
    assert (nobody["running_sequences"], nobody["waiting_sequences"], nobody["last_step"]) == (0, 0, None)
    for told in (own, other):
        assert 0 < told["running_sequences"] + told["waiting_sequences"] <= 60, "not those of the other tenant too"
        assert "kv_bytes_saved" not in told, "all tenants' counters are not told"


def test_metrics_are_of_all_and_so_for_no_tenant(server: RunningServer) -> None:
    assert [server.get("/metrics", **bearer(name)).status_code for name in ("alice", "bob", "ops")] == [403, 403, 200]


def test_a_quota_is_told_and_kept(server: RunningServer) -> None:
    answer = ask(server, "few", prompt=[5] * 290, max_tokens=2)
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-limit-tokens"] == "300"
    assert answer.headers["x-ratelimit-remaining-requests"] == "99"
    assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 30
    refused = ask(server, "few", prompt=[5] * 290, max_tokens=10)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["x-ratelimit-limit-tokens"] == "300"
    message = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 400}
    form = server.post("/v1/messages", message, **bearer("few"))
    assert (form.status_code, form.json()["error"]["type"]) == (429, "rate_limit_error")
    assert "x-ratelimit-limit-tokens" not in ask(server, "bob", prompt=[5]).headers


def test_requests_under_way_are_counted(server: RunningServer) -> None:
    with streaming(server, "one", prompt=[[5]] * 20):
        refused = ask(server, "one", prompt=[5])
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    server.wait_for(lambda: ask(server, "one", prompt=[5]).status_code == 200)


def test_a_priority_beyond_a_key_s_is_refused(server: RunningServer) -> None:
    answer = ask(server, "few", prompt=[5], max_tokens=1, priority=1)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")


def test_a_key_s_queue_does_not_hold_up_another_s(server: RunningServer) -> None:
    body = {"prompt": [[7 + i] * 20 for i in range(100)], **LONG, "max_tokens": 60}
    flood = threading.Thread(target=server.post, args=(COMPLETIONS, body), kwargs=bearer("alice"))
    flood.start()

    def num_waiting() -> float:
        return server.metric("waiting_sequences", **bearer("ops"))

    server.wait_for(lambda: num_waiting() > 20)
    assert ask(server, "bob", prompt=[9] * 20, max_tokens=4).status_code == 200
    assert num_waiting() > 0, "it did not wait for all of the other's"
    flood.join(PATIENCE_S)
    assert not flood.is_alive()
    server.wait_for(lambda: " key=bob" in server.log)


def test_a_tenant_with_a_share_keeps_no_more_than_that(server: RunningServer) -> None:
    labels, ops = '{tenant="tiny"}', bearer("ops")
    budget = server.metric(f"tenant_page_budget{labels}", **ops)
    assert budget >= 6
    for start in range(int(budget)):
        assert ask(server, "tiny", prompt=list(range(1000 + 40 * start, 1040 + 40 * start))).status_code == 200
        assert server.metric(f"tenant_pages{labels}", **ops) <= budget
    assert server.metric(f"tenant_pages{labels}", **ops) > budget - 3
    assert "tenant_pages{" in server.get("/metrics", **ops).text
    assert 'tenant="acme"' not in server.get("/metrics", **ops).text
    last = list(range(1000 + 40 * start, 1040 + 40 * start))
    assert [cached(ask(server, "tiny", prompt=prompt)) for prompt in (last, list(range(1000, 1040)))] == [32, 0]
