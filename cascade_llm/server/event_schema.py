"""The events of streams, as /openapi.json publishes them; what the answers' forms write fits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from cascade_llm.server.answer_schema import (
    AnthropicErrorAnswer,
    CascadeUsage,
    ChatLogprobs,
    ChatToolCall,
    CompletionLogprobs,
    ErrorAnswer,
    MessageUsage,
    TextBlock,
    ToolUseBlock,
    Usage,
)
from cascade_llm.server.schema import Answer, answer_schemas
from cascade_llm.server.sharing_schema import SHARING_EVENTS

__all__ = ["CHAT_EVENTS", "COMPLETION_EVENTS", "DONE", "MESSAGE_EVENTS", "event_schemas", "event_stream"]

DONE = "[DONE]"
"""The data of the last event of a stream in OpenAI's form."""


class ChunkChoice(Answer):
    """What a choice has in both forms of OpenAI's; all but the last piece of one has no finish_reason."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    token_ids: Sequence[int] = ()
    """With `return_token_ids`."""


class Chunk(Answer):
    """What a piece has in both forms: no choices, but the usage, in a last one where that was asked for."""

    id: str
    created: int
    model: str
    usage: Usage | None = None


class CompletionChunkChoice(ChunkChoice):
    """What a sample gained."""

    text: str
    logprobs: CompletionLogprobs | None


class CompletionChunk(Chunk):
    """A piece of an answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]


class ToolCallChunk(ChatToolCall):
    """A call, which comes whole, and its place among the answer's."""

    index: int


class ChatDelta(Answer):
    """What a message gained; the role comes with the first piece."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: Sequence[ToolCallChunk] = ()


class ChatChunkChoice(ChunkChoice):
    """What a sample gained."""

    delta: ChatDelta
    logprobs: ChatLogprobs | None


class ChatChunk(Chunk):
    """A piece of an answer of /v1/chat/completions."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class MessageBeginning(Answer):
    """A message that has no content yet."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock]
    stop_reason: None
    stop_sequence: None
    usage: MessageUsage


class MessageStart(Answer):
    """The first event below /v1/messages."""

    type: Literal["message_start"]
    message: MessageBeginning


class ContentBlockStart(Answer):
    """A block of content begins."""

    type: Literal["content_block_start"]
    index: int
    content_block: TextBlock | ToolUseBlock


class Ping(Answer):
    """Nothing new."""

    type: Literal["ping"]


class TextDelta(Answer):
    """What a text gained."""

    type: Literal["text_delta"]
    text: str


class InputDelta(Answer):
    """The input of a call."""

    type: Literal["input_json_delta"]
    partial_json: str


class ContentBlockDelta(Answer):
    """A block of content goes on."""

    type: Literal["content_block_delta"]
    index: int
    delta: TextDelta | InputDelta


class ContentBlockStop(Answer):
    """A block of content is whole."""

    type: Literal["content_block_stop"]
    index: int


class MessageEnding(Answer):
    """Why a message ended."""

    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None


class OutputUsage(Answer):
    """The tokens of the answer alone."""

    output_tokens: int
    cascade: CascadeUsage | None = None


class MessageDelta(Answer):
    """The message has ended."""

    type: Literal["message_delta"]
    delta: MessageEnding
    usage: OutputUsage


class MessageStop(Answer):
    """The last event."""

    type: Literal["message_stop"]


COMPLETION_EVENTS: Sequence[type[Answer]] = (CompletionChunk, ErrorAnswer)
CHAT_EVENTS: Sequence[type[Answer]] = (ChatChunk, ErrorAnswer)
MESSAGE_EVENTS: Sequence[type[Answer]] = (
    MessageStart,
    ContentBlockStart,
    Ping,
    ContentBlockDelta,
    ContentBlockStop,
    MessageDelta,
    MessageStop,
    AnthropicErrorAnswer,
)


def event_stream(kinds: Sequence[type[Answer]], *, has_names: bool) -> Mapping[str, Any]:
    """The media type of a stream, each of whose events has one of these as its data.

    `has_names`: each event has a name, else the last has `DONE` as its data. The form is that of OpenAPI 3.2,
    in which a stream has an `itemSchema`; earlier readers see a text.
    """
    references = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in kinds]
    data: dict[str, Any] = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": references},
    }
    item = {
        "type": "object",
        "properties": {"data": data, **({"event": {"type": "string"}} if has_names else {})},
        "required": ["event", "data"] if has_names else ["data"],
    }
    told = "Server-sent events." + ("" if has_names else f" The data of the last is {DONE}.")
    return {"schema": {"type": "string"}, "itemSchema": item, "description": told}


def event_schemas() -> Mapping[str, Any]:
    """The schemas of all events by name, and of what they have, for the document's components."""
    kinds = dict.fromkeys((*COMPLETION_EVENTS, *CHAT_EVENTS, *MESSAGE_EVENTS, *SHARING_EVENTS))
    return answer_schemas(list(kinds))
