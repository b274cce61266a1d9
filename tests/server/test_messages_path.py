"""Anthropic's own client, unmodified, against a real server; answers compared with `LLM`'s."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import pytest

from cascade_llm import LLM, SamplingParams
from tests.server.conftest import RunningServer

SYSTEM = "The quick brown fox jumps over the lazy dog, and then it does so once more, from the other side of the fence."
END = 2
"""The id of <|im_end|>."""
ASK: list[Any] = [{"role": "user", "content": "Say it again."}]
CHAT = [{"role": "system", "content": SYSTEM}, *ASK]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
ASKED: dict[str, Any] = {
    "model": "tiny",
    "system": SYSTEM,
    "messages": ASK,
    "max_tokens": 6,
    "extra_body": {"temperature": 0, "ignore_eos": True},
}


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> Iterator[LLM]:
    with LLM(tiny_folder, dtype="float32", num_threads=1, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def text_of(message: anthropic.types.Message) -> str:
    (block,) = message.content
    assert block.type == "text"
    return block.text


def test_messages_are_those_of_chat(client: anthropic.Anthropic, llm: LLM) -> None:
    (expected,) = llm.chat([CHAT], GREEDY)
    message = client.messages.create(**ASKED)
    assert text_of(message) == expected["text"]
    assert (message.role, message.model, message.type) == ("assistant", "tiny", "message")
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    again = client.messages.create(**ASKED).usage
    num_prompt = len(expected.prompt_token_ids)
    assert again.cache_read_input_tokens == (num_prompt - 1) // 16 * 16
    assert again.input_tokens == num_prompt - (num_prompt - 1) // 16 * 16
    assert (again.output_tokens, again.cache_creation_input_tokens) == (6, 0)
    counted = client.messages.count_tokens(model="tiny", system=SYSTEM, messages=ASK)
    assert counted.input_tokens == num_prompt


def test_blocks_are_their_texts_and_turns_of_one_role_are_one(client: anthropic.Anthropic, llm: LLM) -> None:
    blocks: list[Any] = [
        {"type": "text", "text": SYSTEM[:9], "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": SYSTEM[9:]},
    ]
    (expected,) = llm.chat([CHAT], GREEDY)
    assert text_of(client.messages.create(**{**ASKED, "system": blocks})) == expected["text"]
    turns: list[Any] = [
        {"role": "user", "content": "Say"},
        {"role": "user", "content": [{"type": "text", "text": "it"}]},
    ]
    (joined,) = llm.chat([[{"role": "user", "content": "Say\n\nit"}]], GREEDY)
    message = client.messages.create(**{**ASKED, "system": anthropic.omit, "messages": turns})
    assert text_of(message) == joined["text"]


def test_the_last_message_of_the_assistant_is_gone_on_with(client: anthropic.Anthropic, llm: LLM) -> None:
    begun: list[Any] = [*ASK, {"role": "assistant", "content": "The quick"}]
    (expected,) = llm.chat([[CHAT[0], *begun]], GREEDY, add_generation_prompt=False, continue_final_message=True)
    assert text_of(client.messages.create(**{**ASKED, "messages": begun})) == expected["text"]
    counted = client.messages.count_tokens(model="tiny", system=SYSTEM, messages=begun)
    assert counted.input_tokens == len(expected.prompt_token_ids)


def test_a_stream_has_all_events_in_order(client: anthropic.Anthropic, server: RunningServer, llm: LLM) -> None:
    (expected,) = llm.chat([CHAT], GREEDY)
    with client.messages.stream(**ASKED) as stream:
        assert "".join(stream.text_stream) == expected["text"]
        message = stream.get_final_message()
    assert message.stop_reason == "max_tokens"
    assert message.usage.output_tokens == 6
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == len(expected.prompt_token_ids)
    body = {**ASKED, **ASKED["extra_body"], "stream": True}
    events = [part.split("\n") for part in server.post("/v1/messages", body).text.strip().split("\n\n")]
    kinds = [name.removeprefix("event: ") for name, _ in events]
    assert [json.loads(data.removeprefix("data: "))["type"] for _, data in events] == kinds
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert set(kinds[3:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]


def test_stop_sequences_are_named(client: anthropic.Anthropic, llm: LLM) -> None:
    (expected,) = llm.chat([CHAT], GREEDY)
    stop = expected["text"][-3:]
    message = client.messages.create(**ASKED, stop_sequences=["never", stop])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)
    assert text_of(message) == expected["text"][: expected["text"].index(stop)]
    with client.messages.stream(**ASKED, stop_sequences=[stop]) as stream:
        assert stream.get_final_message().stop_sequence == stop
    special = {"temperature": 0, "ignore_eos": True, "logit_bias": {str(END): 100}}  # no text that could be searched
    ended = client.messages.create(**{**ASKED, "extra_body": special}, stop_sequences=["<|im_end|>"])
    assert (ended.stop_reason, ended.stop_sequence) == ("stop_sequence", "<|im_end|>")
    by_itself = client.messages.create(**{**ASKED, "extra_body": {**special, "ignore_eos": False}})
    assert (by_itself.stop_reason, by_itself.stop_sequence) == ("end_turn", None)


def test_what_a_client_gets_wrong(client: anthropic.Anthropic, server: RunningServer) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"messages": ASK}, "max_tokens"),
        ({"messages": ASK, "max_tokens": 0}, "max_tokens is 0"),
        ({"messages": ASK, "max_tokens": "many"}, "max_tokens"),
        ({"messages": [], "max_tokens": 1}, "messages is empty"),
        ({"messages": "hello", "max_tokens": 1}, "messages"),
        ({"messages": [3], "max_tokens": 1}, "messages"),
        ({"messages": CHAT, "max_tokens": 1}, "give its text as system"),
        ({"messages": [{"role": "clown", "content": "a"}], "max_tokens": 1}, "user or assistant"),
        ({"messages": [{"role": "user"}], "max_tokens": 1}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}], "max_tokens": 1}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": ["a"]}], "max_tokens": 1}, "messages.0.content.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1}, "no text block"),
        ({"messages": [{"role": "user", "content": "\udfff"}], "max_tokens": 1}, "surrogate"),
        ({"messages": ASK, "system": [{"type": "x"}], "max_tokens": 1}, "system.0"),
        ({"messages": ASK, "system": 5, "max_tokens": 1}, "system"),
        ({"messages": ASK, "tools": [{"name": "f"}], "max_tokens": 1}, "tools"),
        ({"messages": ASK, "thinking": {"type": "enabled"}, "max_tokens": 1}, "thinking"),
        ({"messages": ASK, "temperature": float("nan"), "max_tokens": 1}, "temperature"),
        ({"messages": ASK, "stop_sequences": [""], "max_tokens": 1}, "stop"),
        ({"messages": ASK, "chat_template_kwargs": {"messages": []}, "max_tokens": 1}, "chat_template_kwargs"),
        ({"messages": [{"role": "user", "content": "word " * 600}], "max_tokens": 1}, "max_model_len"),
    ]
    for body, words in wrong:
        answer = server.post_text("/v1/messages", json.dumps(body))
        assert answer.status_code == 400, (body, answer.text)
        assert answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert words in answer.json()["error"]["message"]
    for path in ("/v1/messages/count_tokens", "/tokenize"):
        kwargs = {"messages": ASK, "chat_template_kwargs": {"messages": []}}
        assert server.post(path, kwargs).status_code == 400
    assert server.get("/v1/messages").json()["type"] == "error"
    with pytest.raises(anthropic.NotFoundError, match="not served here"):
        client.messages.create(**{**ASKED, "model": "large"})
    assert client.messages.create(**ASKED).usage.output_tokens == 6


def test_keys_and_unknown_fields(locked: RunningServer) -> None:
    with anthropic.Anthropic(base_url=locked.url, api_key="first", max_retries=0) as client:
        assert client.messages.create(**ASKED).usage.output_tokens == 6
        with pytest.raises(anthropic.BadRequestError, match="max_token_s"):
            client.messages.create(**{**ASKED, "extra_body": {"max_token_s": 5}})
    with anthropic.Anthropic(base_url=locked.url, api_key="guess", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError, match="x-api-key") as caught:
            client.messages.create(**ASKED)
        assert caught.value.body == {
            "type": "error",
            "error": {"type": "authentication_error", "message": caught.value.body["error"]["message"]},  # type: ignore[index]
        }
