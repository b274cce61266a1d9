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

__all__ = ["ApiError", "anthropic_error_body", "api_error", "error_body", "unforeseen"]

LONGEST_MESSAGE = 600
"""Characters: a message may repeat what a client sent."""
RETRY_AFTER_S = 1

TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "server_error",
}

ANTHROPIC_PATHS = ("/v1/messages",)
"""What the paths begin with whose clients read Anthropic's form."""
ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer with this status; the message says what to change."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self._headers = headers or {}

    @property
    def headers(self) -> dict[str, str]:
        """What goes with the answer."""
        if self.status in (429, 503):
            return {"retry-after": str(RETRY_AFTER_S), **self._headers}
        if self.status == 401:
            return {"www-authenticate": "Bearer", **self._headers}
        return {**({"connection": "close"} if self.status in (408, 413) else {}), **self._headers}

    def body(self, path: str) -> bytes:
        """The JSON of the answer, in the form that clients of this path read."""
        form = anthropic_error_body if path.startswith(ANTHROPIC_PATHS) else error_body
        return json.dumps(form(self)).encode()  # ASCII: a message may repeat half a surrogate pair


def error_body(error: ApiError) -> dict[str, Any]:
    """{"error": {...}}, as OpenAI writes it."""
    kind = TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": _shortened(error), "type": kind, "param": error.param, "code": error.code}}


def anthropic_error_body(error: ApiError) -> dict[str, Any]:
    """{"type": "error", "error": {...}}, as Anthropic writes it."""
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": _shortened(error)}}


def _shortened(error: ApiError) -> str:
    return error.message if len(error.message) <= LONGEST_MESSAGE else error.message[:LONGEST_MESSAGE] + "..."


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
    return unforeseen()


def unforeseen() -> ApiError:
    """What a client is told where the server is to blame."""
    return ApiError(500, "the request failed: the server's log says where", code="internal_error")
