"""The body of /v1/messages: a conversation as Anthropic's clients write it, and what that is as a chat."""

from __future__ import annotations

from typing import Any

from cascade_llm.server.anthropic_blocks import chat_tool_choice, chat_tools, chat_turns, text_blocks
from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.schema import Body, ChatBody, LogitBias, Objects, SharingFields, Texts

__all__ = ["MessagesBody", "MessagesPrompt"]

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
    """POST /v1/messages/count_tokens. Special tokens that texts spell out are plain text."""

    messages: Objects
    system: str | Objects | None = None
    tools: list[Any] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def is_continued(self) -> bool:
        """Whether the answer goes on with the last message."""
        return bool(self.messages) and self.messages[-1].get("role") == "assistant"

    def chat_messages(self) -> list[dict[str, Any]]:
        """The conversation, system first. Raises `ApiError`."""
        if (self.thinking or {}).get("type", "disabled") != "disabled":
            raise ApiError(400, "thinking is not supported: leave it out", param="thinking")
        if not self.messages:
            raise ApiError(400, "messages is empty: give at least one", param="messages")
        system = [{"role": "system", "content": text_blocks("system", self.system)}] if self.system else []
        return [*system, *chat_turns(self.messages)]

    def told_tools(self) -> list[dict[str, Any]] | None:
        """The functions that the model is told of, as a chat has them. Raises `ApiError`."""
        tools, choice = chat_tools(self.tools), chat_tool_choice(self.tool_choice)
        return tools if choice == "auto" else None


class MessagesBody(MessagesPrompt, SharingFields):
    """POST /v1/messages; fields that are not Anthropic's are those of `SamplingParams`."""

    max_tokens: int
    stop_sequences: Texts | None = None
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
    logit_bias: LogitBias | None = None
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
            tools=self.told_tools(),
            parallel_tool_calls=not (self.tool_choice or {}).get("disable_parallel_tool_use"),
            **{name: getattr(self, name) for name in SAME_FIELDS},
        )
