"""What /openapi.json says of answers: their bodies, the statuses of errors, and which paths want a key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cascade_llm.server.answer_schema import ErrorAnswer
from cascade_llm.server.event_schema import event_schemas
from cascade_llm.server.schema import Answer

__all__ = ["Answers", "answers", "error_answers", "openapi_document", "other_answers"]

Answers = dict[int | str, dict[str, Any]]
"""By status, as FastAPI's `responses` takes them."""

MEANINGS: Mapping[int, str] = {
    400: "Something in the request must be changed.",
    401: "The key is missing or wrong.",
    403: "This key may not.",
    404: "There is no such thing.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    421: "The Host header names another server.",
    429: "Too much runs or waits already, or the key's quota is used.",
    500: "The request failed.",
    501: "This server does not do that.",
    503: "The engine is not there.",
    504: "The request's time is over.",
}
ALWAYS = (401, 408, 413, 421, 500)
"""What any path may answer."""


def error_answers(*statuses: int, form: type[Answer] = ErrorAnswer) -> Answers:
    """The errors of a path, beside those that any path may answer."""
    return {status: {"model": form, "description": MEANINGS[status]} for status in sorted({*statuses, *ALWAYS})}


def answers(
    model: type[Answer], events: Mapping[str, Any], *statuses: int, form: type[Answer] = ErrorAnswer
) -> Answers:
    """What a path answers that generates: whole or as events (see `event_stream`), and its errors."""
    told = "The answer; events where stream is true."
    whole = {"model": model, "description": told, "content": {"text/event-stream": dict(events)}}
    return {200: whole, **error_answers(*statuses, form=form)}


def other_answers(media_type: str, content: Mapping[str, Any], *statuses: int) -> Answers:
    """What a path answers that is no JSON, with its schema, and its errors."""
    return {200: {"content": {media_type: dict(content)}}, **error_answers(*statuses)}


def openapi_document(app: FastAPI, *, open_paths: Collection[str], has_keys: bool) -> dict[str, Any]:
    """The document of an application.

    Args:
        app: FastAPI's own document says 422 for wrong bodies; this application answers 400
        open_paths: asked without a key
        has_keys: whether the others want one
    """
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if not has_keys or path in open_paths:
                operation["responses"].pop("401", None)
                operation["security"] = []
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for unused in ("ValidationError", "HTTPValidationError"):
        schemas.pop(unused, None)
    components["schemas"] = {**event_schemas(), **schemas}
    if has_keys:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        document["security"] = [{"bearer": []}, {"key": []}]
    return document
