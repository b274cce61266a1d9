"""Lines of a batch file in OpenAI's form: requests as they come in, and the records that answer them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cascade_llm.errors import nearest_name_hint
from cascade_llm.server.answer_forms import AnswerForm, ChatForm, CompletionForm
from cascade_llm.server.api_errors import ApiError, error_body
from cascade_llm.server.schema import ChatBody, CompletionBody, GenerationBody, read_body

__all__ = [
    "URLS",
    "BatchError",
    "BatchLine",
    "BatchUrl",
    "answer_record",
    "error_record",
    "numbered_lines",
    "read_line",
]

LONGEST_LINE = 8 << 20
"""Bytes."""
SESSION_FIELDS = ("session_id", "fork_of", "drop_session_on_disconnect")
"""A session's turns follow each other."""
CUT_AT = 80
"""Characters of a user's text that a message repeats."""


@dataclass(frozen=True)
class BatchUrl:
    """What a url asks for."""

    body: type[GenerationBody]
    form: type[AnswerForm]
    prefix: str
    """Of answers' ids."""


URLS: Mapping[str, BatchUrl] = {
    "/v1/chat/completions": BatchUrl(ChatBody, ChatForm, "chatcmpl"),
    "/v1/completions": BatchUrl(CompletionBody, CompletionForm, "cmpl"),
}


@dataclass(frozen=True)
class BatchLine:
    """One request."""

    number: int
    """Of its line, from 1."""
    custom_id: str
    url: BatchUrl
    body: GenerationBody


class BatchError(Exception):
    """What is wrong with a line; `custom_id` where the line has one of its own."""

    def __init__(self, number: int, custom_id: str | None, error: ApiError) -> None:
        super().__init__(error.message)
        self.number, self.custom_id, self.error = number, custom_id, error


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1. One that is too long is given up to its limit."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            rest = line
            while not rest.endswith(b"\n") and (rest := file.readline(LONGEST_LINE)):
                pass
            if line.strip():
                yield number, line


def read_line(number: int, line: bytes) -> BatchLine:
    """The request of a line. Raises `BatchError`."""
    record = _read_json(number, line)
    custom_id = record.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        _refuse(number, None, "custom_id must be a text, and no empty one", "custom_id")
    if (method := record.get("method", "POST")) != "POST":
        _refuse(number, custom_id, f"method is {_shown(method)}: it must be POST", "method")
    name = record.get("url")
    url = URLS.get(name) if isinstance(name, str) else None
    if url is None:
        hint = nearest_name_hint(name, URLS) if isinstance(name, str) else f"write {' or '.join(URLS)}"
        _refuse(number, custom_id, f"url is {_shown(name)}: {hint}", "url")
    if not isinstance(record.get("body"), dict):
        _refuse(number, custom_id, "body must be an object, the request itself", "body")
    try:
        body = read_body(url.body, record["body"])
        if body.stream:
            raise ApiError(400, "stream: answers of a batch are whole, leave it out", param="stream")
        if taken := [name for name in SESSION_FIELDS if getattr(body, name) is not None]:
            message = f"{taken[0]}: lines of a batch run in any order, leave it out, what they share is found anyway"
            raise ApiError(400, message, param=taken[0], code="unsupported_field")
    except ApiError as error:
        raise BatchError(number, custom_id, error) from None
    return BatchLine(number, custom_id, url, body)


def answer_record(custom_id: str, request_id: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a request that was answered."""
    response = {"status_code": 200, "request_id": request_id, "body": body}
    return {"id": f"batch_{request_id}", "custom_id": custom_id, "response": response, "error": None}


def error_record(failure: BatchError) -> dict[str, Any]:
    """The record of a line that was not: `error` says why, and `response` too where the line has its own custom_id."""
    request_id, error = f"req_{failure.number}", failure.error
    response = {"status_code": error.status, "request_id": request_id, "body": error_body(error)}
    return {
        "id": f"batch_{request_id}",
        "custom_id": failure.custom_id,
        "response": None if failure.custom_id is None else response,
        "error": {"code": error.code, "message": error_body(error)["error"]["message"], "line": failure.number},
    }


def _read_json(number: int, line: bytes) -> dict[str, Any]:
    if len(line) > LONGEST_LINE:
        _refuse(number, None, f"the line is longer than {LONGEST_LINE} bytes: shorten it")
    try:
        record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        _refuse(number, None, f"the line is no UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:
        _refuse(number, None, f"the line is no JSON ({error}): write one object on each line")
    if not isinstance(record, dict):
        _refuse(number, None, f"the line is a JSON {type(record).__name__}: write one object on each line")
    return record


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _refuse(number: int, custom_id: str | None, message: str, param: str | None = None) -> NoReturn:
    raise BatchError(
        number, custom_id, ApiError(400, f"line {number}: {message}", param=param, code="invalid_line")
    ) from None


def _shown(value: object) -> str:
    return f"{value!r:.{CUT_AT}}"
