"""Streams against what /openapi.json says of their events."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import jsonschema_rs
import pytest

from cascade_llm.server.engine_client import EngineStatus
from cascade_llm.server.event_schema import DONE
from tests.patience import PATIENCE_S
from tests.server.conftest import RunningServer

CHAT, COMPLETIONS, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
LIVE_VIEW = "/v1/cascade/events"
ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Say it."}], "max_tokens": 4, "ignore_eos": True}
USAGE = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}


@pytest.fixture(scope="module")
def document(server: RunningServer) -> dict[str, Any]:
    told: dict[str, Any] = server.get("/openapi.json").json()
    return told


def item_schema(document: Mapping[str, Any], path: str) -> dict[str, Any]:
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    schema: dict[str, Any] = content["text/event-stream"]["itemSchema"]
    return schema


def data_validator(document: Mapping[str, Any], path: str) -> jsonschema_rs.Draft202012Validator:
    schema = item_schema(document, path)["properties"]["data"]["contentSchema"]
    return jsonschema_rs.Draft202012Validator({**schema, "components": document["components"]})


def events(text: str) -> Iterator[dict[str, str]]:
    for block in text.removesuffix("\n\n").split("\n\n"):
        yield dict(line.split(": ", 1) for line in block.split("\n"))  # type: ignore[misc]


def stream(server: RunningServer, path: str, body: Mapping[str, Any]) -> list[dict[str, str]]:
    response = server.post(path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    return list(events(response.text))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "The sea", "max_tokens": 3}),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "logprobs": 2, "echo": True, "return_token_ids": True, **USAGE}),
        (CHAT, ASK),
        (CHAT, {**ASK, "logprobs": True, "top_logprobs": 2, "return_token_ids": True, "n": 2, **USAGE}),
        (MESSAGES, ASK),
        (MESSAGES, {**ASK, "stop_sequences": ["e", "a", " "]}),
    ],
)
def test_every_event_of_a_stream_is_one_of_the_documents(
    server: RunningServer, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    told = stream(server, path, body)
    if path == MESSAGES:
        assert all(event["event"] == json.loads(event["data"])["type"] for event in told)
        assert told[-1]["event"] == "message_stop"
    else:
        assert told.pop()["data"] == DONE
    validator, item = data_validator(document, path), item_schema(document, path)
    for event in told:
        jsonschema_rs.Draft202012Validator(item).validate(event)
        validator.validate(json.loads(event["data"]))


def test_every_event_of_the_live_view_is_one_of_the_documents(server: RunningServer, document: dict[str, Any]) -> None:
    content = document["paths"][LIVE_VIEW]["get"]["responses"]["200"]["content"]
    item = content["text/event-stream"]["itemSchema"]
    schema = {**item["properties"]["data"]["contentSchema"], "components": document["components"]}
    validator = jsonschema_rs.Draft202012Validator(schema)
    with httpx.stream("GET", server.url + LIVE_VIEW, timeout=PATIENCE_S) as answer:
        lines = (line for line in answer.iter_lines() if line and not line.startswith(":"))
        for name, data in zip(lines, lines, strict=False):
            (event,) = events(f"{name}\n{data}")
            jsonschema_rs.Draft202012Validator(item).validate(event)
            told = json.loads(event["data"])
            validator.validate(told)
            assert not validator.is_valid({**told, "more": 1})
            if told["last_step"] is not None:
                break
            assert server.post(COMPLETIONS, {"prompt": "The sea", "n": 2, "max_tokens": 8}).status_code == 200
    silent = [status.value for status in EngineStatus if status is not EngineStatus.READY]
    assert all(validator.is_valid({"engine": status}) for status in silent)
    assert not validator.is_valid({"engine": "ready"})


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, MESSAGES])
def test_the_document_fits_nothing_else(server: RunningServer, document: dict[str, Any], path: str) -> None:
    body = {"prompt": "a", "max_tokens": 1} if path == COMPLETIONS else ASK
    first = json.loads(stream(server, path, body)[0]["data"])
    validator = data_validator(document, path)
    assert validator.is_valid(first)
    assert not validator.is_valid({**first, "more": 1})
    assert not validator.is_valid({name: value for name, value in first.items() if name not in ("id", "message")})
    error = {"type": "error", "error": {"type": "a", "message": "b"}}
    openai_error = {"error": {"message": "a", "type": "b", "param": None, "code": None}}
    assert validator.is_valid(error) == (path == MESSAGES)
    assert validator.is_valid(openai_error) == (path != MESSAGES)


def test_the_documents_references_lead_somewhere(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert {"CompletionChunk", "ChatChunk", "MessageStart", "ContentBlockDelta"} <= schemas.keys()
    names = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert names <= schemas.keys()
