"""The bodies of requests, as FastAPI reads and publishes them; what the bodies of answers have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    Strict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic.json_schema import models_json_schema

from cascade_llm.errors import nearest_name_hint
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.server.api_errors import ApiError

__all__ = [
    "Answer",
    "ChatBody",
    "CompletionBody",
    "DetokenizeBody",
    "GenerationBody",
    "LogitBias",
    "Objects",
    "SharingFields",
    "Texts",
    "TokenizeBody",
    "answer_schemas",
    "read_body",
    "refuse_other_models",
    "refuse_unknown_fields",
    "wrong_body",
]

SESSION_ID = r"^[A-Za-z0-9._:-]{1,128}$"
PART = 256
"""Members of an object that are read at once."""
NO_OBJECT = ("model_type", "model_attributes_type")
PARAMETERS = tuple(field.name for field in fields(SamplingParams))


class FirstFault:
    """A list whose reading ends at its first wrong entry: pydantic would report millions, and all others would wait.

    pydantic's own mark for that cannot stand in a union.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        """The list's schema, with that."""
        return {**handler(source), "fail_fast": True}


def _in_parts(value: object, read: ValidatorFunctionWrapHandler) -> object:
    """An object, some members at a time: it ends at the first part that has a wrong one."""
    if not isinstance(value, dict):
        return read(value)
    members = iter(value.items())
    whole: dict[Any, Any] = {}
    while part := dict(islice(members, PART)):
        whole |= read(part)
    return whole


TokenKey = Annotated[int, Strict(False)]
"""A token id as the name of a JSON object's member, which is always a text."""
Texts = Annotated[list[str], FirstFault()]
TokenIds = Annotated[list[int], FirstFault()]
Prompts = Annotated[list[TokenIds], FirstFault()]
Objects = Annotated[list[dict[str, Any]], FirstFault()]
LogitBias = Annotated[dict[TokenKey, float], WrapValidator(_in_parts)]
KINDS: Mapping[str, str] = {
    "str": "a text",
    "list[int]": "token ids",
    "list[str]": "a list of texts",
    "list[list[int]]": "lists of token ids",
    "list[dict[str,any]]": "a list of blocks",
}
"""What a field of several kinds takes, in words, by pydantic's names."""


class Answer(BaseModel):
    """The body of an answer: no other fields than these."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


def answer_schemas(kinds: Sequence[type[Answer]]) -> Mapping[str, Any]:
    """JSON schemas of bodies of answers, and of what they have, by name; they refer to each other as components."""
    asked = [(kind, "serialization") for kind in kinds]
    _, document = models_json_schema(asked, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas: Mapping[str, Any] = document["$defs"]
    return schemas


class Body(BaseModel):
    """What all bodies have. A number in quotes is none, and true is not 1."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), strict=True)

    model: str | None = Field(None, description="One of /v1/models; without it the only one.")


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(extra="allow", strict=True)

    include_usage: bool | None = Field(None, description="A last piece says how many tokens there were.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: every piece says how many so far."
    )


class SharingFields(BaseModel):
    """With whom a body shares pages, and of which conversation it is a turn."""

    cache_salt: str | None = Field(
        None, min_length=1, max_length=256, description="Pages are shared only with requests that give the same."
    )
    session_id: str | None = Field(
        None, pattern=SESSION_ID, description="The conversation: its pages stay held between its turns."
    )
    fork_of: str | None = Field(
        None, pattern=SESSION_ID, description="session_id begins on the pages of this session, as a branch of it."
    )
    drop_session_on_disconnect: bool | None = Field(None, description="A client that leaves ends the session.")


class GenerationBody(Body, SharingFields):
    """What both ways to generate have; fields that are not OpenAI's are those of `SamplingParams`."""

    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | Texts | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    top_k: int | None = Field(None, description="Keep the k most probable tokens; 0 or -1 keeps all.")
    min_p: float | None = Field(None, description="Drop tokens less probable than this share of the most probable.")
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = Field(None, description="Lower runs earlier.")
    return_token_ids: bool | None = Field(None, description="Choices say the ids of their tokens.")

    def given_params(self) -> dict[str, Any]:
        """The fields of `SamplingParams` that were given under their own names."""
        given = {name: getattr(self, name, None) for name in PARAMETERS if name not in ("logprobs", "prompt_logprobs")}
        return {name: value for name, value in given.items() if value is not None}


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: str | TokenIds | Texts | Prompts = Field(
        description="A text, token ids, or a list of either: one prompt each."
    )
    echo: bool | None = Field(None, description="The answer begins with the prompt.")
    logprobs: int | None = None
    best_of: int | None = Field(None, description="Only n, which is all that is generated.")
    suffix: str | None = Field(None, description="Refused.")
    split_special_tokens: bool | None = Field(None, description="Read special tokens in the text as plain text.")


class ChatBody(GenerationBody):
    """POST /v1/chat/completions. Special tokens that a message spells out are plain text."""

    messages: Objects = Field(description='Each {"role": ..., "content": text or parts of it}.')
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = Field(None, description="Go on with the last message.")
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: str | None = Field(None, description="Instead of the model's own, where the server allows it.")
    tools: list[Any] | None = Field(None, description="Functions that the model may call, where its template has them.")
    tool_choice: Any = Field(None, description='"auto" or "none".')
    parallel_tool_calls: bool | None = Field(None, description="false: only the first call of an answer counts.")
    response_format: dict[str, Any] | None = Field(None, description='Only {"type": "text"}.')


class TokenizeBody(Body):
    """POST /tokenize: a text, or messages."""

    prompt: str | None = None
    messages: Objects | None = None
    tools: list[Any] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: TokenIds


BodyKind = TypeVar("BodyKind", bound=Body)


def read_body(kind: type[BodyKind], value: object) -> BodyKind:
    """A body from its JSON value. Raises `ApiError` for the first field that is wrong."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise wrong_body(error.errors(include_url=False, include_context=False, include_input=False)) from None


def wrong_body(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What a client is told of pydantic's findings: the first."""
    first = errors[0]
    parts = [str(part) for part in first["loc"] if part != "body"]
    if not parts and first["type"] in NO_OBJECT:
        return ApiError(400, "the body is no JSON object: send one, with the header Content-Type: application/json")
    if len(parts) > 1 and parts[1] in KINDS:
        kinds = [error["loc"][error["loc"].index(parts[0]) + 1] for error in errors if parts[0] in error["loc"]]
        names = [KINDS[kind] for kind in dict.fromkeys(kinds) if kind in KINDS]
        message = f"{parts[0]} must be {', '.join(names[:-1])} or {names[-1]}"
        return ApiError(400, message, code="invalid_type", param=parts[0])
    place = ".".join(parts)[:200]
    return ApiError(400, f"{place or 'the body'}: {first['msg']}", code="invalid_type", param=place or None)


def refuse_other_models(body: Body, names: Sequence[str]) -> None:
    """Raises `ApiError` for a body that names none of these; one without a name means the first."""
    if body.model is not None and body.model not in names:
        message = f"the model {body.model!r:.80} is not served here: {', '.join(names)} is"
        raise ApiError(404, message, code="model_not_found", param="model")


def refuse_unknown_fields(body: BaseModel) -> None:
    """Raises `ApiError` for the first field that is none of the body's."""
    known: Iterable[str] = type(body).model_fields
    for name in body.model_extra or {}:
        raise ApiError(400, f"unknown field {name[:80]!r}: {nearest_name_hint(name, known)}", code="unknown_field")
    inner = getattr(body, "stream_options", None)
    if inner is not None:
        refuse_unknown_fields(inner)
