"""What answers say of the steps that made them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.conftest import RunningServer

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "ignore_eos": True}
FIELDS = {"steps", "shared_steps", "levels", "group_size", "kv_bytes_read", "kv_bytes_saved"}


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, MESSAGES])
def test_usage_says_what_was_read_whole_and_streamed(server: RunningServer, path: str) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True} if path == COMPLETIONS else HELLO
    whole = server.post(path, body).json()["usage"]["cascade"]
    assert whole.keys() == FIELDS
    assert (whole["steps"], whole["levels"], whole["group_size"], whole["kv_bytes_saved"]) == (3, 1, 1, 0)
    assert whole["kv_bytes_read"] > 0
    streamed = server.post(path, {**body, "stream": True, "stream_options": {"include_usage": True}})
    (told,) = [event["usage"]["cascade"] for event in events(streamed.text) if "cascade" in (event.get("usage") or ())]
    assert told["steps"] == 3


def test_usage_of_several_prompts_and_samples_is_of_them_all(server: RunningServer) -> None:
    body = {"prompt": [[5, 6], [7]], "n": 2, "max_tokens": 4, "stop": ["a stop string that never comes"]}
    usage = server.post(COMPLETIONS, {**body, "ignore_eos": True}).json()["usage"]
    assert usage["completion_tokens"] == 16
    assert usage["cascade"]["steps"] >= 2 * 4 + 2 * 3, "the first tokens of two samples come from one step"


def test_a_stop_string_tells_as_well(server: RunningServer) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 40, "ignore_eos": True, "temperature": 0}
    text = server.post(COMPLETIONS, body).json()["choices"][0]["text"]
    answer = server.post(COMPLETIONS, {**body, "stop": [text[4:6]]}).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert 0 < answer["usage"]["cascade"]["steps"] <= 40
