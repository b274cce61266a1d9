"""The bodies of answers, as FastAPI publishes them; what `answer_forms` and `anthropic_form` write fits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from cascade_llm.server.schema import Answer

__all__ = [
    "AnthropicErrorAnswer",
    "Chat",
    "Completion",
    "Deleted",
    "Detokenized",
    "ErrorAnswer",
    "Health",
    "InputTokens",
    "Message",
    "Model",
    "Models",
    "Readiness",
    "Sessions",
    "Tokenized",
    "TokenizerInfo",
    "Version",
]


class CachedTokens(Answer):
    """Of the prompt."""

    cached_tokens: int


class CascadeUsage(Answer):
    """What its steps read of the KV cache, and shared with other sequences; see `RequestMetrics`."""

    steps: int
    shared_steps: int
    levels: int
    group_size: int
    kv_bytes_read: int
    kv_bytes_saved: int


class Usage(Answer):
    """How many tokens an answer took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    cascade: CascadeUsage | None = None


class CompletionLogprobs(Answer):
    """Lists of one entry per token; the first of a prompt has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(Answer):
    """What a choice has in both forms of OpenAI's."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    token_ids: Sequence[int] = ()
    """With `return_token_ids`."""


class CompletionChoice(Choice):
    """One sample of one prompt."""

    text: str
    logprobs: CompletionLogprobs | None


class Completion(Answer):
    """The answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class TopLogprob(Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """One that was drawn, and the most probable ones."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """One entry per token."""

    content: list[ChatLogprob]


class CalledFunction(Answer):
    """A function and its arguments, a JSON object as a text."""

    name: str
    arguments: str


class ChatToolCall(Answer):
    """What the model wants to be called."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(Answer):
    """What the model says; null beside calls where that is nothing."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: Sequence[ChatToolCall] = ()


class ChatChoice(Choice):
    """One sample."""

    message: ChatMessage
    logprobs: ChatLogprobs | None


class Chat(Answer):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class TextBlock(Answer):
    """What the model says, in Anthropic's form."""

    type: Literal["text"]
    text: str


class ToolUseBlock(Answer):
    """What the model wants to be called, in Anthropic's form."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]


class MessageUsage(Answer):
    """Tokens in Anthropic's form: those from the cache are beside the input, not among it."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int
    cascade: CascadeUsage | None = None


class Message(Answer):
    """The answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ToolUseBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage


class InputTokens(Answer):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int


class Model(Answer):
    """A name of the model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cascade-llm"
    max_model_len: int | None
    """Tokens of the context; null until the model is loaded."""


class Models(Answer):
    """All of its names."""

    object: Literal["list"] = "list"
    data: list[Model]


class Session(Answer):
    """A conversation whose pages are held."""

    id: str
    object: Literal["session"]
    held_pages: int
    held_tokens: int
    idle_s: float


class Sessions(Answer):
    """All of them, the least recently used first."""

    object: Literal["list"] = "list"
    data: list[Session]
    held_pages: int
    budget_pages: int


class Deleted(Answer):
    """A session that was given up."""

    id: str
    object: Literal["session"] = "session"
    deleted: Literal[True] = True


class Tokenized(Answer):
    """The answer of /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int


class Detokenized(Answer):
    """The answer of /detokenize."""

    prompt: str


class TokenizerInfo(Answer):
    """The answer of /tokenizer_info: what a client needs to count tokens and write conversations as the model does."""

    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None
    chat_template: str | list[dict[str, str]] | None = None


class Version(Answer):
    """The server's version."""

    version: str


class Health(Answer):
    """Whether the engine's loop is alive."""

    status: Literal["ok", "starting", "failed", "stalled"]
    reason: str | None = None


class Readiness(Answer):
    """Whether a request would be taken."""

    ready: bool
    engine: str


class ErrorDetail(Answer):
    """What is wrong, and what to change."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """An error in OpenAI's form."""

    error: ErrorDetail


class AnthropicErrorDetail(Answer):
    """The same in Anthropic's."""

    type: str
    message: str


class AnthropicErrorAnswer(Answer):
    """An error in Anthropic's form."""

    type: Literal["error"]
    error: AnthropicErrorDetail
