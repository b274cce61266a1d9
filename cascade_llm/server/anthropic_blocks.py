"""Messages and tools as Anthropic's clients write them, and what these are in a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cascade_llm.server.api_errors import ApiError

__all__ = ["chat_tool_choice", "chat_tools", "chat_turns", "text_blocks"]

Blocks = list[dict[str, Any]]
ROLES = ("user", "assistant")


def chat_turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation; texts of one role in a row are one message. Raises `ApiError` with the place of what is wrong."""
    chat: list[dict[str, Any]] = []
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in ROLES:
            cure = "give its text as system" if role == "system" else f"it must be {' or '.join(ROLES)}"
            raise ApiError(400, f"messages.{index}.role is {role!r:.80}: {cure}", param="messages")
        for turn in _turns(f"messages.{index}.content", str(role), message.get("content")):
            if chat and chat[-1]["role"] == turn["role"] != "tool" and not (chat[-1].keys() | turn.keys()) - TEXT_KEYS:
                chat[-1]["content"] += [{"type": "text", "text": "\n\n"}, *turn["content"]]
            else:
                chat.append(turn)
    return chat


TEXT_KEYS = {"role", "content"}


def chat_tools(tools: Sequence[object] | None) -> list[dict[str, Any]] | None:
    """Tools as functions. Raises `ApiError` for those that a server would have to run, and for what is none."""
    functions = []
    for index, tool in enumerate(tools or ()):
        kind = tool.get("type") or "custom" if isinstance(tool, Mapping) else None
        schema = tool.get("input_schema") if isinstance(tool, Mapping) else None
        if not isinstance(tool, Mapping) or kind != "custom" or not isinstance(schema, Mapping):
            cure = 'give {"name": ..., "description": ..., "input_schema": {...}}'
            raise ApiError(400, f"tools.{index} is no tool of the client's own: {cure}", param="tools")
        told = {"description": tool["description"]} if tool.get("description") is not None else {}
        functions.append(
            {"type": "function", "function": {"name": tool.get("name"), **told, "parameters": dict(schema)}}
        )
    return functions or None


def chat_tool_choice(choice: Mapping[str, Any] | None) -> str:
    """ "auto" or "none". Raises `ApiError` for a choice that would force the model."""
    kind = (choice or {}).get("type", "auto")
    if kind not in ("auto", "none"):
        cure = 'leave it to the model, with "auto", or have it call nothing, with "none"'
        raise ApiError(400, f"tool_choice.type is {kind!r:.80}: {cure}", param="tool_choice")
    return str(kind)


def text_blocks(where: str, content: object) -> Blocks:
    """A text, or a list of text blocks, as the parts of a chat's message. Raises `ApiError`."""
    texts, others = _divided(where, content)
    if others:
        raise _no_block(*others[0])
    return texts


def _turns(where: str, role: str, content: object) -> list[dict[str, Any]]:
    """One message as a chat's: results of tools come before the text beside them, calls with it."""
    texts, others = _divided(where, content)
    said: list[dict[str, Any]] = [{"role": role, "content": texts}] if texts or not others else []
    if role == "user":
        return [_result(*block) for block in others] + said
    if others:
        calls = [_call(*block) for block in others]
        return [{"role": role, "content": texts or None, "tool_calls": calls}]
    return said


def _divided(where: str, content: object) -> tuple[Blocks, list[tuple[str, dict[str, Any]]]]:
    """Text blocks, and the other blocks with their places."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}], []
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where} must be a text, or a list of blocks and no empty one", param=where)
    texts: Blocks = []
    others = []
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise _no_block(f"{where}.{index}", block)
        if block.get("type") == "text" and isinstance(block.get("text"), str):
            texts.append({"type": "text", "text": block["text"]})
        else:
            others.append((f"{where}.{index}", block))
    return texts, others


def _call(where: str, block: dict[str, Any]) -> dict[str, Any]:
    name, given = block.get("name"), block.get("input")
    if block.get("type") != "tool_use" or not isinstance(name, str) or not isinstance(given, dict):
        raise _no_block(where, block)
    return {"id": block.get("id"), "type": "function", "function": {"name": name, "arguments": given}}


def _result(where: str, block: dict[str, Any]) -> dict[str, Any]:
    if block.get("type") != "tool_result":
        raise _no_block(where, block)
    content = block.get("content")
    told = text_blocks(f"{where}.content", content) if content else [{"type": "text", "text": ""}]
    return {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": told}


def _no_block(where: str, block: object) -> ApiError:
    cure = 'give {"type": "text", "text": ...}, the tool_use of an assistant, or the tool_result of a user'
    return ApiError(400, f"{where} is no text block, nor one of a tool: {cure}", param=where)
