"""Messages of a conversation, checked, as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cascade_llm.errors import RequestError

__all__ = ["plain_messages", "text_of"]

THOUGHT_NAMES = ("reasoning_content", "thinking", "reasoning")
"""Of what an assistant thought, in messages: the first that is there counts."""


def plain_messages(messages: Sequence[Mapping[str, Any]], keeps_parts: bool = False) -> list[dict[str, Any]]:
    """Messages as templates take them: contents as one string, or where these are kept as a list of parts.

    What an assistant thought has both of the names that templates read. Names the first message that cannot be.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(f'messages is {messages!r}: give a list of {{"role": ..., "content": ...}}')
    if not messages:
        raise RequestError('messages is empty: give at least one {"role": "user", "content": ...}')
    return [_plain_message(index, message, keeps_parts) for index, message in enumerate(messages)]


def _plain_message(index: int, message: object, keeps_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f'messages[{index}] is {message!r}: give {{"role": ..., "content": ...}}')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(f'messages[{index}] has the role {role!r}: give "system", "user", "assistant" or "tool"')
    thought = next((message[name] for name in THOUGHT_NAMES if message.get(name) is not None), None)
    if thought is not None:
        message = {"thinking": thought, **message, "reasoning_content": thought}
    if content is None and message.get("tool_calls"):
        return {**message, "content": None}
    if isinstance(content, list | tuple):
        content = [_checked_part(index, part) for part in content]
        content = content if keeps_parts else text_of(content)
    if not isinstance(content, str | list):
        raise RequestError(f"messages[{index}] has content of type {type(content).__name__}: give a string")
    return {**message, "content": content}


def _checked_part(index: int, part: object) -> dict[str, Any]:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return dict(part)
    raise RequestError(f'messages[{index}] has a part that is no text: give {{"type": "text", "text": ...}}')


def text_of(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """One string of a checked content; an empty one of none."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)
