"""Bodies that nobody means well with: a 4xx in the right form or an answer, nothing of them in the log."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cascade_llm.server.answer_schema import AnthropicErrorAnswer, ErrorAnswer
from cascade_llm.server.anthropic_body import MessagesBody
from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.schema import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    TokenizeBody,
    read_body,
    wrong_body,
)
from tests.patience import PATIENCE_S
from tests.server.conftest import RunningServer

SECRET = "plover-xyzzy"
TURN = {"role": "user", "content": SECRET}
BODIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/completions": (CompletionBody, {"prompt": SECRET, "max_tokens": 1}),
    "/v1/chat/completions": (ChatBody, {"messages": [TURN], "max_tokens": 1}),
    "/v1/messages": (MessagesBody, {"messages": [TURN], "max_tokens": 1}),
    "/tokenize": (TokenizeBody, {"prompt": SECRET}),
    "/detokenize": (DetokenizeBody, {"tokens": [5]}),
}
FIELDS = [(path, name) for path, (body, _) in BODIES.items() for name in body.model_fields]

texts = st.one_of(
    st.text(st.characters(), max_size=20),  # half surrogate pairs among them
    st.sampled_from([SECRET, "<|im_end|>", f"<|im_start|>system\n{SECRET}", "{{ 1 }}", "\0", "\ud800", "\r\n: a"]),
)
numbers = st.one_of(
    st.integers(),
    st.floats(),  # NaN and infinities among them
    st.sampled_from([10**400, -(10**19), 1 << 31, 1 << 63, 1e308, -0.0, 5e-324]),
)
values = st.recursive(
    st.none() | st.booleans() | texts | numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
messages = st.lists(
    st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", SECRET]), values, max_size=4), max_size=3
)
changes = st.tuples(st.sampled_from(FIELDS), values | messages)


def deep(depth: int) -> Any:
    value: Any = SECRET
    for _ in range(depth):
        value = [value]
    return value


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    headers = {"content-type": "application/json"}
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S, headers=headers) as client:
        yield client


@given(change=changes)
def test_any_value_in_any_field(
    server: RunningServer, client: httpx.Client, change: tuple[tuple[str, str], Any]
) -> None:
    (path, name), value = change
    assert_answered(client, path, json.dumps({**BODIES[path][1], "user": SECRET, name: value}))
    assert SECRET not in server.log
    assert " 500 " not in server.log


@pytest.mark.slow
@settings(max_examples=3000)
@given(change=changes)
def test_very_many_values(server: RunningServer, client: httpx.Client, change: tuple[tuple[str, str], Any]) -> None:
    (path, name), value = change
    assert_answered(client, path, json.dumps({**BODIES[path][1], "user": SECRET, name: value}))
    assert " 500 " not in server.log


def assert_answered(client: httpx.Client, path: str, content: str | bytes) -> httpx.Response:
    """A success, or an error in the path's form that says something."""
    answer = client.post(path, content=content)
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500, answer.text
        form = AnthropicErrorAnswer if path.startswith("/v1/messages") else ErrorAnswer
        assert form.model_validate_json(answer.content).error.message
    return answer


@pytest.mark.parametrize("path", BODIES)
def test_nested_and_duplicated(server: RunningServer, client: httpx.Client, path: str) -> None:
    for name in BODIES[path][0].model_fields:
        assert_answered(client, path, json.dumps({**BODIES[path][1], name: deep(900)}))
    assert assert_answered(client, path, b'{"user":' + b'{"a":' * 100_000).status_code == 400
    assert assert_answered(client, path, b"\xef\xbb\xbf{}").status_code == 400
    assert_answered(client, path, b'{"prompt": 1, "prompt": "a", "tokens": [], "messages": 3}')
    assert SECRET not in server.log
    assert server.get("/ready").status_code == 200


MANY = 5000
MANY_FAULTS: list[Any] = [
    *([fault] * MANY for fault in (None, 1.5, [1.5] * 2, {"a": 1})),
    *([right] * MANY + [fault] for right, fault in ((1, "a"), ("a", 1), ([1], [None] * MANY))),
    *({f"{name}{i}": value for i in range(MANY)} for name, value in (("x", 1), ("", "a"))),
]


@pytest.mark.parametrize("path", BODIES)
def test_a_body_has_few_faults_however_many_values_are_wrong(path: str) -> None:
    kind, right = BODIES[path]
    for name in kind.model_fields:
        for value in MANY_FAULTS:
            errors = faults(kind, {**right, name: value})
            assert len(errors) < MANY / 8, name  # each costs time in the server's loop
            assert not errors or wrong_body(errors).message.startswith(name)


def faults(kind: Any, value: object) -> list[Any]:
    try:
        kind.model_validate(value)
    except ValidationError as error:
        return list(error.errors())
    return []


def test_a_list_of_several_kinds_says_which() -> None:
    for value in ([1.5], ["a", 1], [[1], "a"], {}, None):
        with pytest.raises(ApiError, match="prompt must be a text, token ids, a list of texts or lists of token ids"):
            read_body(CompletionBody, {"prompt": value})
    assert len(read_body(CompletionBody, {"prompt": "a", "logit_bias": dict.fromkeys("123", 1)}).logit_bias or ()) == 3
    every = {str(i): i / 8 for i in range(1000)}
    assert read_body(CompletionBody, {"prompt": "a", "logit_bias": every}).logit_bias == {
        int(name): bias for name, bias in every.items()
    }


def test_a_body_of_a_hundred_megabytes_is_not_read(server: RunningServer) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    assert b" 413 " in _begin(server, head + b"content-length: 104857600\r\n\r\n", 0)
    assert b" 413 " in _begin(server, head + b"transfer-encoding: chunked\r\n\r\n", 100)
    assert server.get("/ready").status_code == 200


def _begin(server: RunningServer, head: bytes, num_chunks: int) -> bytes:
    """Send a head and chunks of a MiB until the server has had enough; returns the first line of its answer."""
    parts = urlsplit(server.url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=PATIENCE_S) as client:
        client.sendall(head)
        chunk = b"100000\r\n" + b"a" * (1 << 20) + b"\r\n"
        try:
            for _ in range(num_chunks):
                client.sendall(chunk)
            return client.recv(1 << 16).split(b"\r\n")[0]
        except (BrokenPipeError, ConnectionResetError):  # it has answered and closed
            return client.recv(1 << 16).split(b"\r\n")[0]
