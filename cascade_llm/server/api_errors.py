"""Errors as OpenAI's clients read them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cascade_llm.errors import (
    CascadeError,
    EngineClosedError,
    PromptError,
    RequestError,
    SamplingParamsError,
    WorkerError,
)

__all__ = ["ApiError", "api_error", "error_body"]

LONGEST_MESSAGE = 600
"""Characters: a message may repeat what a client sent."""
RETRY_AFTER_S = 1

TYPES: Mapping[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}


class ApiError(Exception):
    """An answer with this status; the message says what to change."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the answer."""
        if self.status in (429, 503):
            return {"retry-after": str(RETRY_AFTER_S)}
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"connection": "close"} if self.status in (408, 413) else {}

    @property
    def body(self) -> bytes:
        """The JSON of the answer."""
        return json.dumps(error_body(self)).encode()  # ASCII: a message may repeat half a surrogate pair


def error_body(error: ApiError) -> dict[str, Any]:
    """{"error": {...}}, as OpenAI writes it."""
    message = error.message if len(error.message) <= LONGEST_MESSAGE else error.message[:LONGEST_MESSAGE] + "..."
    kind = TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def api_error(error: CascadeError) -> ApiError:
    """What a client is told of one of the package's errors."""
    if isinstance(error, EngineClosedError | WorkerError):
        return ApiError(503, str(error), code="engine_unavailable")
    if isinstance(error, PromptError) and "max_model_len" in str(error):
        return ApiError(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, SamplingParamsError):
        name = str(error).split(" ")[0]
        return ApiError(400, str(error), code="invalid_value", param=name if name.isidentifier() else None)
    if isinstance(error, RequestError):
        return ApiError(400, str(error), code="invalid_value")
    return ApiError(500, "the request failed: the server's log says where", code="internal_error")
