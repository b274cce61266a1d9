"""The fields of a chat's body that are about tools: what the template gets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cascade_llm.engine.tokenizer import Tokenizer
from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.tool_calls import ToolForm, form_of_template

__all__ = ["asked_tools", "tool_form", "with_read_arguments"]

CURE = "leave it to the model, with 'auto', or have it call nothing, with 'none'"


def asked_tools(tools: Sequence[object] | None, choice: object) -> list[Mapping[str, Any]] | None:
    """The tools that the model is to be told of; None where it is to call none. Raises `ApiError`."""
    if choice not in (None, "none", "auto"):
        shown = choice if isinstance(choice, str) else "of one function"
        raise ApiError(400, f"tool_choice {shown!r:.80}: {CURE}", param="tool_choice", code="unsupported_field")
    asked: list[Mapping[str, Any]] = []
    for index, tool in enumerate(tools or ()):
        function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
        if not isinstance(tool, Mapping) or not isinstance(function, Mapping) or not _is_text(function.get("name")):
            cure = 'give {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
            raise ApiError(400, f"tools.{index} is no function: {cure}", param="tools")
        asked.append(tool)
    return None if choice == "none" else asked or None


def tool_form(tokenizer: Tokenizer | None) -> ToolForm:
    """How the model writes calls, as its template tells. Raises `ApiError` for one that knows no tools."""
    if tokenizer is None:
        raise ApiError(
            400, "this checkpoint has no tokenizer: leave tools out", param="tools", code="unsupported_field"
        )
    template = tokenizer.tool_template
    form = form_of_template(template.source) if "tools" in template.names else None
    if form is None:
        known = "writes calls in a form that is not read here" if "tools" in template.names else "reads no tools"
        raise ApiError(
            400, f"this model's chat template {known}: leave tools out", param="tools", code="unsupported_field"
        )
    return form


def with_read_arguments(messages: Sequence[Any]) -> list[Any]:
    """The conversation with the arguments of its calls as objects, for templates write these as JSON themselves.

    Raises `ApiError` for arguments that are none.
    """
    return [_read_message(index, message) for index, message in enumerate(messages)]


def _read_message(index: int, message: Any) -> Any:
    calls = message.get("tool_calls") if isinstance(message, Mapping) else None
    if not calls:
        return message
    if not isinstance(calls, list):
        raise ApiError(400, f"messages.{index}.tool_calls must be a list", param="messages")
    return {**message, "tool_calls": [_read_call(f"messages.{index}.tool_calls.{i}", c) for i, c in enumerate(calls)]}


def _read_call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not _is_text(function.get("name")):
        cure = 'give {"id": ..., "type": "function", "function": {"name": ..., "arguments": "{...}"}}'
        raise ApiError(400, f"{where} is no call of a function: {cure}", param="messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments or "{}")
        except (msgspec.DecodeError, RecursionError, UnicodeEncodeError):
            arguments = None
    if not isinstance(arguments, Mapping):
        raise ApiError(400, f"{where}.function.arguments must be a JSON object, as a text", param="messages")
    return {**call, "function": {**function, "arguments": arguments}}


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)
