"""Tools through the clients of OpenAI and Anthropic, of a model that calls one, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from tests.patience import PATIENCE_S
from tests.server.conftest import RunningServer, started
from tests.server.speaking_model import save_speaking
from tests.server.test_event_schema import data_validator, stream
from tests.server.test_hostile_bodies import deep

SAID = "I look. "
ANSWER = SAID + '<tool_call>{"name":"weather", "arguments": {"city":"Rome"}}'
"""With no token twice; so it has no closing."""
TEMPLATE = """
{%- if tools %}{{ '<|im_start|>system\\nInside <tool_call></tool_call>: ' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') }}
{%- for call in m.tool_calls or [] %}{{ call.function.name + ' ' + (call.function.arguments | tojson) }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"type": "function", "function": {"name": "weather", "description": "Of now.", "parameters": SCHEMA}}
TOOL = {"name": "weather", "description": "Of now.", "input_schema": SCHEMA}
ASK: list[Any] = [{"role": "user", "content": "And Rome?"}]
CHAT, MESSAGES, COUNT = "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"


@pytest.fixture(scope="module")
def speaking(
    repo_root: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    folder = save_speaking(tmp_path_factory.mktemp("speaking"), ANSWER, TEMPLATE)
    with started(folder, "--served-model-name", "tiny", repo_root=repo_root, environment=environment) as running:
        running.wait_until_ready()
        yield running


@pytest.fixture
def client(speaking: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{speaking.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def claude(speaking: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=speaking.url, api_key="none", max_retries=0) as client:
        yield client


def test_openai_s_client_gets_calls(client: openai.OpenAI) -> None:
    tools: list[Any] = [FUNCTION]
    (choice,) = client.chat.completions.create(model="tiny", messages=ASK, tools=tools).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", SAID.rstrip())
    (call,) = choice.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Rome"})
    with client.chat.completions.stream(model="tiny", messages=ASK, tools=tools) as told:
        (streamed,) = told.get_final_completion().choices
    assert (streamed.finish_reason, streamed.message.content) == ("tool_calls", SAID.rstrip())
    (again,) = streamed.message.tool_calls or []
    assert (again.function.name, again.function.arguments) == (call.function.name, call.function.arguments)
    assert again.id != call.id
    for answer in ({"tools": openai.omit}, {"tools": tools, "tool_choice": "none"}):
        (choice,) = client.chat.completions.create(model="tiny", messages=ASK, **answer).choices
        assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", ANSWER, None)
    cut = client.chat.completions.create(model="tiny", messages=ASK, tools=tools, max_tokens=8).choices[0]
    assert cut.finish_reason == "length"
    assert ANSWER.startswith(cut.message.content or "?")


def test_anthropic_s_client_gets_calls(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 60, "tools": [TOOL]}
    message = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as told:
        streamed = told.get_final_message()
    for answer in (message, streamed):
        assert answer.stop_reason == "tool_use"
        text, call = answer.content
        assert (text.type, call.type) == ("text", "tool_use")
        assert text.type == "text"
        assert text.text == SAID.rstrip()
        assert call.type == "tool_use"
        assert (call.name, call.input) == ("weather", {"city": "Rome"})
    (text,) = claude.messages.create(**{**asked, "tool_choice": {"type": "none"}}).content
    assert text.type == "text"
    assert text.text == ANSWER


def test_streams_with_calls_fit_the_document(speaking: RunningServer) -> None:
    document = speaking.get("/openapi.json").json()
    for path, tools in ((CHAT, [FUNCTION]), (MESSAGES, [TOOL])):
        events = stream(speaking, path, {"messages": ASK, "tools": tools, "max_tokens": 60})
        for event in events[: None if path == MESSAGES else -1]:
            data_validator(document, path).validate(json.loads(event["data"]))
        assert "tool_" in "".join(event["data"] for event in events)


def test_the_template_gets_tools_calls_and_results(speaking: RunningServer) -> None:
    def text(body: dict[str, Any]) -> str:
        ids = speaking.post("/tokenize", body).json()["tokens"]
        return str(speaking.post("/detokenize", {"tokens": ids}).json()["prompt"])

    call = {"id": "123456789", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "123456789", "content": "Sun."},
    ]
    shown = text({"messages": messages, "tools": [FUNCTION]})
    assert '"description": "Of now."' in shown
    assert 'weather {"city": "Rome"}' in shown
    assert "<|im_start|>tool\nSun.<|im_end|>" in shown
    blocks = [
        *ASK,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Rome"}}],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Well?"},
                {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "Sun."}]},
            ],
        },
    ]
    counted = speaking.post(COUNT, {"messages": blocks, "tools": [TOOL]}).json()["input_tokens"]
    same = [*messages, {"role": "user", "content": "Well?"}]
    assert counted == speaking.post("/tokenize", {"messages": same, "tools": [FUNCTION]}).json()["count"]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (CHAT, {"tools": [FUNCTION], "tool_choice": "required"}, "'auto'"),
        (CHAT, {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "weather"}}}, "'auto'"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools.0"),
        (CHAT, {"tools": ["weather"]}, "tools.0"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "\udfff"}}]}, "surrogate"),
        (CHAT, {"tools": [{**FUNCTION, "more": deep(900)}]}, "nested too deeply"),
        (CHAT, {"messages": [{**ASK[0], "more": deep(900)}]}, "nested too deeply"),
        (MESSAGES, {"tools": [{**TOOL, "input_schema": {"more": deep(900)}}]}, "nested too deeply"),
        (CHAT, {"messages": [*ASK, {"role": "assistant", "tool_calls": "f"}]}, "messages.1.tool_calls"),
        (CHAT, {"messages": [*ASK, {"role": "assistant", "tool_calls": [{}]}]}, "messages.1.tool_calls.0"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "["}}]}]},
            "messages.0.tool_calls.0.function.arguments",
        ),
        (MESSAGES, {"tools": [TOOL], "tool_choice": {"type": "any"}}, "tool_choice.type"),
        (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "client's own"),
        (MESSAGES, {"tools": [{"name": "f"}]}, "tools.0"),
        (MESSAGES, {"tools": [{"input_schema": {}}]}, "tools.0"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages.0.content.0"),
        (
            MESSAGES,
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": 3}]}]},
            "messages.0.content.0",
        ),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}]},
            "messages.0.content.0.content.0",
        ),
    ],
)
def test_what_is_wrong_is_named(speaking: RunningServer, path: str, body: dict[str, Any], words: str) -> None:
    text = json.dumps({"messages": ASK, "max_tokens": 4, **body})  # ASCII: half a surrogate pair has no UTF-8
    answer = speaking.post_text(path, text)
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_a_model_that_knows_no_tools_says_so(server: RunningServer) -> None:
    for path, tools in ((CHAT, [FUNCTION]), (MESSAGES, [TOOL]), (COUNT, [TOOL])):
        answer = server.post(path, {"messages": ASK, "max_tokens": 4, "tools": tools})
        assert answer.status_code == 400, answer.text
        assert "reads no tools" in answer.json()["error"]["message"]
    assert server.post(CHAT, {"messages": ASK, "max_tokens": 1, "tools": []}).status_code == 200
