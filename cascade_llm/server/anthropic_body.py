"""The body of /v1/messages: a conversation as Anthropic's clients write it, and what that is as a chat."""

from __future__ import annotations

from typing import Any

from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.schema import Body, ChatBody, SharingFields, TokenKey

__all__ = ["MessagesBody", "MessagesPrompt"]

Blocks = list[dict[str, Any]]
ROLES = ("user", "assistant")
SAME_FIELDS = (
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stream",
    "min_p",
    "seed",
    "min_tokens",
    "ignore_eos",
    "logit_bias",
    "priority",
    "chat_template_kwargs",
    *SharingFields.model_fields,
)
"""What a chat has under the same name."""


class MessagesPrompt(Body):
    """POST /v1/messages/count_tokens. Blocks are texts; special tokens that they spell out are plain text."""

    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    thinking: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def is_continued(self) -> bool:
        """Whether the answer goes on with the last message."""
        return bool(self.messages) and self.messages[-1].get("role") == "assistant"

    def chat_messages(self) -> list[dict[str, Any]]:
        """The conversation, system first; messages of one role in a row are one. Raises `ApiError`."""
        if self.tools:
            raise ApiError(400, "tools are not supported: leave them out", param="tools")
        if (self.thinking or {}).get("type", "disabled") != "disabled":
            raise ApiError(400, "thinking is not supported: leave it out", param="thinking")
        chat: list[dict[str, Any]] = []
        if self.system:
            chat.append({"role": "system", "content": _text_blocks("system", self.system)})
        for index, message in enumerate(self.messages):
            role = message.get("role")
            if role not in ROLES:
                cure = "give its text as system" if role == "system" else f"it must be {' or '.join(ROLES)}"
                raise ApiError(400, f"messages.{index}.role is {role!r:.80}: {cure}", param="messages")
            blocks = _text_blocks(f"messages.{index}.content", message.get("content"))
            if chat and chat[-1]["role"] == role:
                chat[-1]["content"] += [{"type": "text", "text": "\n\n"}, *blocks]
            else:
                chat.append({"role": role, "content": blocks})
        if not self.messages:
            raise ApiError(400, "messages is empty: give at least one", param="messages")
        return chat


class MessagesBody(MessagesPrompt, SharingFields):
    """POST /v1/messages; fields that are not Anthropic's are those of `SamplingParams`."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None

    min_p: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[TokenKey, float] | None = None
    priority: int | None = None

    def as_chat(self) -> ChatBody:
        """The same request to /v1/chat/completions. Raises `ApiError`."""
        if self.max_tokens < 1:
            raise ApiError(400, f"max_tokens is {self.max_tokens}: it must be 1 or larger", param="max_tokens")
        return ChatBody(
            messages=self.chat_messages(),
            stop=self.stop_sequences,
            add_generation_prompt=not self.is_continued,
            continue_final_message=self.is_continued,
            **{name: getattr(self, name) for name in SAME_FIELDS},
        )


def _text_blocks(where: str, content: object) -> Blocks:
    """A text, or a list of blocks, as the parts of a chat's message."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not content:
        raise ApiError(400, f"{where} must be a text, or a list of blocks and no empty one", param=where)
    blocks: Blocks = []
    for index, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text" or not isinstance(block.get("text"), str):
            cure = 'give {"type": "text", "text": ...}'
            raise ApiError(400, f"{where}.{index} is no text block: {cure}", param=where)
        blocks.append({"type": "text", "text": block["text"]})
    return blocks
