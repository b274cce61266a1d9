"""Sessions through the API of a real server."""

from __future__ import annotations

import json
import uuid
from typing import Any

import httpx
import pytest

from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.messages import EngineFacts
from cascade_llm.server.options import ServerOptions
from cascade_llm.server.reading import RequestReader
from cascade_llm.server.schema import CompletionBody
from tests.server.conftest import RunningServer, StartServer

COMPLETIONS, SESSIONS = "/v1/completions", "/v1/sessions"
PROMPT = list(range(100, 150))  # 3 pages of 16 and 2 tokens


def new_id() -> str:
    """One that no other test of the shared server uses."""
    return uuid.uuid4().hex


def turn(server: RunningServer, prompt: list[int], **fields: Any) -> tuple[list[int], int]:
    """The conversation after it, and how much of its prompt was cached."""
    answer = server.post(
        COMPLETIONS,
        {"prompt": prompt, "max_tokens": 20, "ignore_eos": True, "temperature": 0, "return_token_ids": True, **fields},
    ).json()
    cached: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return [*prompt, *answer["choices"][0]["token_ids"]], cached


def held(server: RunningServer) -> dict[str, int]:
    return {item["id"]: item["held_pages"] for item in server.get(SESSIONS).json()["data"]}


def drop(server: RunningServer, session_id: str) -> httpx.Response:
    return server.client.delete(f"{SESSIONS}/{session_id}")


def test_turns_fork_list_and_drop(server: RunningServer) -> None:
    talk, branch = new_id(), new_id()
    text, _ = turn(server, PROMPT, session_id=talk)
    assert held(server)[talk] == 4, "69 of its 70 tokens have K/V"
    text, cached = turn(server, [*text, 5, 6], session_id=talk)
    assert cached == 64
    _, cached = turn(server, [*text, 7], session_id=branch, fork_of=talk)
    assert cached == 80
    listed = server.get(SESSIONS).json()
    assert listed["object"] == "list"
    assert [item["id"] for item in listed["data"]][-2:] == [talk, branch], "the last used comes last"
    assert listed["data"][-1]["held_tokens"] == 16 * listed["data"][-1]["held_pages"]
    assert 0 < listed["held_pages"] <= listed["budget_pages"]
    for session_id in (talk, branch):
        assert drop(server, session_id).json() == {"id": session_id, "object": "session", "deleted": True}
        again = drop(server, session_id)
        assert (again.status_code, again.json()["error"]["code"]) == (404, "session_not_found")
    assert not {talk, branch} & held(server).keys()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_a_chat_has_sessions_too(server: RunningServer, path: str) -> None:
    talk = new_id()
    messages = [{"role": "user", "content": "Tell me about pages. " * 10}]
    body = {"messages": messages, "max_tokens": 4, "session_id": talk}
    assert server.post(path, body).status_code == 200
    assert held(server)[talk] > 0
    drop(server, talk)


@pytest.mark.parametrize("is_dropped", [False, True])
def test_a_cut_stream_drops_a_session_only_where_that_was_asked(server: RunningServer, is_dropped: bool) -> None:
    talk = new_id()
    text, _ = turn(server, PROMPT, session_id=talk)
    body = {
        "prompt": text,
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": True,
        "session_id": talk,
        "drop_session_on_disconnect": is_dropped,
    }
    with server.client.stream("POST", COMPLETIONS, json=body) as answer:
        next(answer.iter_lines())
    server.wait_for(lambda: server.metric("running_sequences") == 0)
    assert (talk in held(server)) is not is_dropped
    drop(server, talk)


@pytest.mark.slow
def test_budget_of_nothing_leaves_the_prefix_cache(start_server: StartServer) -> None:
    server = start_server("--session-share", "0")
    server.wait_until_ready()
    text, _ = turn(server, PROMPT, session_id="talk")
    assert held(server) == {}
    assert turn(server, text, session_id="talk")[1] == 64


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"session_id": ""}, "session_id"),
        ({"session_id": "a/b"}, "session_id"),
        ({"session_id": "a\n"}, "session_id"),
        ({"session_id": "\ud800"}, "session_id"),
        ({"session_id": "a" * 129}, "session_id"),
        ({"session_id": 3}, "session_id"),
        ({"session_id": "a", "fork_of": "é"}, "fork_of"),
        ({"fork_of": "a"}, "fork_of"),
        ({"session_id": "a", "n": 2}, "session_id"),
        ({"session_id": "a", "prompt": [[1], [2]]}, "session_id"),
    ],
)
def test_wrong_fields_are_named(server: RunningServer, fields: dict[str, Any], param: str) -> None:
    body = json.dumps({"prompt": [1, 2], "max_tokens": 1, **fields})
    answer = server.post_text(COMPLETIONS, body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_refused_where_no_prefix_is_kept() -> None:
    facts = EngineFacts("tiny", 100, 64, 8, [2], 0, has_prefix_cache=False)
    reader = RequestReader(None, facts, ServerOptions())
    with pytest.raises(ApiError, match="keeps no prefixes"):
        reader.read_completion(CompletionBody(prompt=[1, 2], session_id="a"))
