"""Whatever a client sends: a 4xx that says what to change, nothing of it in the log, and the next one is served."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from cascade_llm.engine.chat_template import ChatTemplate
from cascade_llm.errors import RequestError
from cascade_llm.server.api_errors import api_error
from tests.patience import PATIENCE_S
from tests.server.conftest import RunningServer

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
SECRET = "xyzzy-plugh"
KEY = {"authorization": "Bearer first"}

WRONG: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": None}, "prompt"),
    (COMPLETIONS, {"prompt": []}, "empty"),
    (COMPLETIONS, {"prompt": ""}, "empty"),
    (COMPLETIONS, {"prompt": [[]]}, "empty"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
    (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "token id -1"),
    (COMPLETIONS, {"prompt": [10**9]}, "token id"),
    (COMPLETIONS, {"prompt": [10**400]}, ""),
    (COMPLETIONS, {"prompt": [5] * 600}, "max_model_len"),
    (COMPLETIONS, {"prompt": "word " * 600}, "max_model_len"),
    (COMPLETIONS, {"prompt": "a\ud800b"}, "surrogate"),
    (COMPLETIONS, {"prompt": "a", "model": "other"}, "not served"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
    (COMPLETIONS, {"prompt": "a", "best_of": 3}, "best_of"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n is 0"),
    (COMPLETIONS, {"prompt": "a", "n": 10**6}, "n is"),
    (COMPLETIONS, {"prompt": "a", "n": 17}, "at most 16"),
    (COMPLETIONS, {"prompt": ["a"] * 17}, "at most 16"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**30}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": "many"}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": float("nan")}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": float("inf")}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p"),
    (COMPLETIONS, {"prompt": "a", "logprobs": -1}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 10**6}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "priority": 1 << 40}, "priority"),
    (COMPLETIONS, {"prompt": "a", "seed": 1 << 70}, "seed"),
    (COMPLETIONS, {"prompt": "a", "stop": [""]}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": 5}, "stop"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"99999999": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "stop_token_ids": [-5]}, "stop_token_ids"),
    (COMPLETIONS, {"prompt": "a", "min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    (COMPLETIONS, {"prompt": "a", "stream_options": 3}, "stream_options"),
    (CHAT, {"messages": []}, "messages is empty"),
    (CHAT, {"messages": "hello"}, "messages"),
    (CHAT, {"messages": [3]}, "messages"),
    (CHAT, {"messages": [{"content": "a"}]}, "role"),
    (CHAT, {"messages": [{"role": "user"}]}, "content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "no text"),
    (CHAT, {"messages": [{"role": "user", "content": "\udfff"}]}, "surrogate"),
    (CHAT, {"messages": HELLO, "top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools"),
    (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, "response_format"),
    (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"messages": HELLO, "max_tokens": 0}, "max_tokens"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "messages": HELLO}, "one of them"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [1 << 80]}, "tokens"),
]

RAW = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 100_000,
    b'{"prompt": "a"} and more',
]


def assert_error(answer: httpx.Response, *words: str) -> None:
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(answer.text) < 2000
    for word in words:
        assert word in error["message"]


def test_what_a_chat_template_refuses_is_the_client_s_error_in_the_template_s_words() -> None:
    template = ChatTemplate("{{ raise_exception('the user speaks first') }}")
    with pytest.raises(RequestError) as caught:
        template.render(HELLO, False)
    told = api_error(caught.value)
    assert told.status == 400
    assert str(told).endswith("the user speaks first")


def assert_serves(server: RunningServer, **headers: str) -> None:
    answer = server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 2, "ignore_eos": True}, **headers)
    assert answer.json()["usage"]["completion_tokens"] == 2


def test_wrong_values_are_named(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        for path, body, word in WRONG:
            content = json.dumps({**body, "user": SECRET})
            answer = client.post(path, content=content, headers={"content-type": "application/json"})
            assert_error(answer, word)
    odd = {"messages": HELLO, "max_tokens": 1, "stop": f"<|im_end|>{SECRET}", "chat_template_kwargs": {SECRET: 1}}
    assert server.post(CHAT, odd).status_code == 200
    assert_serves(server)
    assert SECRET not in server.log


def test_bodies_that_are_no_json(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        for content in RAW:
            for path in (COMPLETIONS, CHAT, "/tokenize", "/detokenize"):
                answer = client.post(path, content=content, headers={"content-type": "application/json"})
                assert_error(answer)
        assert_error(client.post(COMPLETIONS, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"}))
    assert_serves(server)


def test_paths_and_methods_that_are_not_there(server: RunningServer) -> None:
    assert server.post("/v1/embeddings", {"input": "a"}).json()["error"]["code"] == "unsupported"
    assert server.get("/v1/nothing").status_code == 404
    assert server.get("/v1/nothing").json()["error"]["message"]
    assert server.get(COMPLETIONS).status_code == 405


def test_unknown_fields_are_ignored_or_refused(server: RunningServer, locked: RunningServer) -> None:
    assert server.post(COMPLETIONS, {"prompt": "a", "max_tokens": 1, "best_off": 2}).status_code == 200
    for fields, words in (({"best_off": 2}, ("best_off", "'best_of'")), ({"stream_options": {"x": 1}}, ("'x'",))):
        assert_error(locked.post(COMPLETIONS, {"prompt": "a", **fields}, **KEY), *words)


def test_templates_of_clients_are_held_to_limits(locked: RunningServer) -> None:
    own = {"messages": HELLO, "chat_template": "{{ messages[0].content }}!", "max_tokens": 1}
    told = locked.post(CHAT, own, **KEY)
    assert told.status_code == 200, told.text
    bare = locked.post(COMPLETIONS, {"prompt": "hello!", "max_tokens": 1}, **KEY)
    assert told.json()["usage"]["prompt_tokens"] == bare.json()["usage"]["prompt_tokens"]
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert_error(locked.post(CHAT, {**own, "chat_template": endless}, **KEY), "was stopped")
    assert_error(locked.post(CHAT, {**own, "chat_template": "{{ messages"}, **KEY), "no Jinja template")
    assert_error(locked.post(CHAT, {**own, "chat_template": "{{ ''.__class__.__mro__ }}"}, **KEY), "refuses")


def test_limits_are_kept(locked: RunningServer) -> None:
    too_large = locked.post(COMPLETIONS, {"prompt": "a" * 4000}, **KEY)
    assert too_large.status_code == 413
    assert_error(too_large, "4000 bytes")
    assert_error(locked.post(COMPLETIONS, {"prompt": "a", "max_tokens": 7}, **KEY), "at most 6")
    assert_error(locked.post(COMPLETIONS, {"prompt": [5] * 100}, **KEY), "at most 99")
    assert locked.post(COMPLETIONS, {"prompt": "a"}, **KEY).json()["usage"]["completion_tokens"] <= 6
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer first\r\n"
    chunked = _send(locked, head + b"transfer-encoding: chunked\r\n\r\n" + CHUNKS)
    assert b" 413 " in chunked.split(b"\r\n")[0]
    assert_serves(locked, **KEY)


CHUNKS = (b"7d0\r\n" + b"a" * 2000 + b"\r\n") * 3


def test_what_is_no_http(server: RunningServer) -> None:
    assert b" 400 " in _send(server, b"\x16\x03\x01 nonsense\r\n\r\n").split(b"\r\n")[0]
    with _connection(server) as half:
        half.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{")
    assert_serves(server)


def test_a_client_that_leaves_frees_its_pages(server: RunningServer) -> None:
    for stream in (True, False):
        body = json.dumps({"prompt": "leaving", "max_tokens": 480, "stream": stream, "ignore_eos": True, "n": 4})
        before = server.metric("finished_requests_total")
        with _connection(server) as client:
            client.sendall(_post(body))
            _until(lambda: server.metric('pages{state="held"}') > 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # at once
        _until(lambda: server.metric('pages{state="held"}') == 0)
        assert server.metric("open_samples") == 0
        assert server.metric("finished_requests_total") >= before
    server.wait_for(lambda: " 499 " in server.log)
    assert_serves(server)


def test_a_full_queue_is_told_and_a_slow_reader_stalls_nobody(server: RunningServer) -> None:
    body = {"prompt": "slow", "max_tokens": 300, "stream": True, "ignore_eos": True, "n": 16, "logprobs": 5}
    with _connection(server) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(_post(json.dumps(body)))
        _until(lambda: server.metric("open_samples") == 16)
        full = server.post(COMPLETIONS, {"prompt": "a"})
        assert full.status_code == 429
        assert int(full.headers["retry-after"]) >= 1
        assert_error(full, "16 samples")
        _until(lambda: server.metric("open_samples") == 0)  # all was generated although nothing was read
        assert_serves(server)


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def _post(body: str) -> bytes:
    head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
    return f"{head}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


def _connection(server: RunningServer) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=PATIENCE_S)


def _send(server: RunningServer, data: bytes) -> bytes:
    with _connection(server) as client:
        client.sendall(data)
        return client.recv(65536)


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_answer(server: RunningServer, path: str) -> None:
    assert server.get(path).status_code == 200
