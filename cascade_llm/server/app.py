"""The application: which paths there are, what they take and answer, and the forms of errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware

from cascade_llm import __version__
from cascade_llm.errors import CascadeError
from cascade_llm.server.answer_forms import ChatForm, CompletionForm
from cascade_llm.server.answer_schema import (
    AnthropicErrorAnswer,
    Chat,
    Completion,
    Health,
    InputTokens,
    Message,
    Model,
    Models,
    Readiness,
    Version,
)
from cascade_llm.server.anthropic_body import MessagesBody, MessagesPrompt
from cascade_llm.server.anthropic_form import MessagesForm
from cascade_llm.server.api import Api, beside, record_of
from cascade_llm.server.api_errors import ApiError, api_error, unforeseen
from cascade_llm.server.event_schema import CHAT_EVENTS, COMPLETION_EVENTS, MESSAGE_EVENTS, event_stream
from cascade_llm.server.guard import ENDLESS_PATH, OPEN_PATHS, Application, Guard, OnEnd
from cascade_llm.server.page_files import PAGE_PATHS, add_page
from cascade_llm.server.published import Answers, answers, error_answers, openapi_document, other_answers
from cascade_llm.server.quotas import RATE_HEADERS
from cascade_llm.server.schema import ChatBody, CompletionBody, wrong_body
from cascade_llm.server.session_paths import add_session_paths
from cascade_llm.server.sharing_schema import SHARING_EVENTS

__all__ = ["build_application"]

UNSUPPORTED = {"/v1/embeddings": "embeddings are not computed: this server generates text"}
"""Paths that clients know and this server refuses."""


def build_application(api: Api, on_end: OnEnd) -> Application:
    """The ASGI application of a server; `on_end` is told of each request when it is over."""
    app = FastAPI(title="cascade-llm", version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    open_paths = OPEN_PATHS.union(PAGE_PATHS if api.options.page else ())
    _add_generation(app, api)
    _add_paths(app, api)
    _add_refusals(app)
    _add_error_forms(app)

    @app.get("/openapi.json", include_in_schema=False)
    async def document() -> dict[str, Any]:
        """What is served, for programs that read it."""
        return await asyncio.to_thread(openapi_document, app, open_paths=open_paths, has_keys=bool(api.keys))

    guarded: Application = Guard(
        app,
        api.metrics,
        paths=[str(getattr(route, "path", "")) for route in app.routes],
        open_paths=open_paths,
        keys=api.keys,
        allowed_hosts=api.options.checked_hosts(has_keys=bool(api.keys)),
        max_body_bytes=api.options.max_body_bytes,
        body_timeout_s=api.options.body_timeout,
        on_end=on_end,
    )
    if api.options.allow_origin:
        guarded = CORSMiddleware(
            guarded,
            allow_origins=list(api.options.allow_origin),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "x-api-key", "anthropic-version", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after", *RATE_HEADERS],
        )
    return guarded


def _add_generation(app: FastAPI, api: Api) -> None:
    statuses = (400, 404, 429, 503, 504)
    pieces = event_stream(COMPLETION_EVENTS, has_names=False)

    @app.post("/v1/completions", response_model=None, responses=answers(Completion, pieces, *statuses))
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Continue prompts."""
        record = record_of(request)
        return await api.generate(body, record, "cmpl", CompletionForm, lambda reader: reader.read_completion(body))

    pieces = event_stream(CHAT_EVENTS, has_names=False)

    @app.post("/v1/chat/completions", response_model=None, responses=answers(Chat, pieces, *statuses))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        record = record_of(request)
        return await api.generate(body, record, "chatcmpl", ChatForm, lambda reader: reader.read_chat(body))

    events = event_stream(MESSAGE_EVENTS, has_names=True)
    in_anthropic_form = answers(Message, events, *statuses, form=AnthropicErrorAnswer)

    @app.post("/v1/messages", response_model=None, responses=in_anthropic_form)
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Answer a conversation, as Anthropic's clients ask."""
        record = record_of(request)
        api.ready_reader(body)
        chat = body.as_chat()
        return await api.generate(chat, record, "msg", MessagesForm, lambda reader: reader.read_chat(chat))

    errors = error_answers(400, 404, 503, form=AnthropicErrorAnswer)

    @app.post("/v1/messages/count_tokens", responses=errors)
    async def count_tokens(body: MessagesPrompt) -> InputTokens:
        """The tokens of such a conversation."""
        reader = api.ready_reader(body)
        messages, kwargs, goes_on = body.chat_messages(), body.chat_template_kwargs, body.is_continued
        tools = body.told_tools()
        ids = await beside(
            lambda: reader.tokenize_chat(messages, kwargs, tools=tools, add_prompt=not goes_on, is_continued=goes_on)
        )
        return InputTokens(input_tokens=len(ids))


def _add_paths(app: FastAPI, api: Api) -> None:
    @app.get("/v1/models", responses=error_answers())
    async def models() -> Models:
        """The models that are served."""
        return api.models()

    @app.get("/v1/models/{name:path}", responses=error_answers(404))
    async def model(name: str) -> Model:
        """One of them."""
        for entry in api.models().data:
            if entry.id == name:
                return entry
        raise ApiError(404, f"the model {name!r:.80} is not served here", code="model_not_found", param="model")

    add_session_paths(app, api.engine, api.options.step_timeout)

    @app.get("/version", responses=error_answers())
    async def version() -> Version:
        """The server's version."""
        return Version(version=__version__)

    app.post("/tokenize", responses=error_answers(400, 404, 503))(api.tokenize)
    app.post("/detokenize", responses=error_answers(400, 404, 503))(api.detokenize)
    app.get("/tokenizer_info", responses=error_answers(400, 503))(api.tokenizer_info)
    probes: dict[str, tuple[Any, Any]] = {"/health": (api.health, Health), "/ready": (api.ready, Readiness)}
    for path, (probe, form) in probes.items():
        said: Answers = {status: {"model": form} for status in (200, 503)}
        app.get(path, response_model=None, responses={**error_answers(), **said})(probe)
    events = event_stream(SHARING_EVENTS, has_names=True)
    others: dict[str, tuple[Any, Answers]] = {
        "/metrics": (api.metrics_text, other_answers("text/plain", {"schema": {"type": "string"}}, 403)),
        ENDLESS_PATH: (api.sharing_events, other_answers("text/event-stream", events, 429)),
    }
    for path, (answer, said) in others.items():
        app.get(path, response_model=None, response_class=Response, responses=said)(answer)
    if api.options.page:
        add_page(app)


def _add_refusals(app: FastAPI) -> None:
    for path, reason in UNSUPPORTED.items():
        app.post(
            path,
            response_model=None,
            operation_id=path.strip("/").replace("/", "_"),
            status_code=501,
            responses=error_answers(501),
        )(_refusal(reason))


def _refusal(reason: str) -> Callable[[], Response]:
    def refuse() -> Response:
        """Not served here."""
        raise ApiError(501, reason, code="unsupported")

    return refuse


def _add_error_forms(app: FastAPI) -> None:
    def answer(request: Request, error: ApiError) -> Response:
        return Response(error.body(request.url.path), error.status, error.headers, media_type="application/json")

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    @app.exception_handler(CascadeError)
    async def on_cascade_error(request: Request, error: CascadeError) -> Response:
        return answer(request, api_error(error))

    @app.exception_handler(RequestValidationError)
    async def on_wrong_body(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(
                request, ApiError(400, f"the body is no JSON (at character {first['loc'][-1]}): send one object")
            )
        return answer(request, wrong_body(error.errors()))

    async def on_http_error(request: Request, error: Exception) -> Response:
        status = int(getattr(error, "status_code", 500))
        reasons = {400: "the body cannot be read as JSON: send one object", 404: "there is nothing at this path"}
        message = reasons.get(status, str(getattr(error, "detail", "the request cannot be served")))
        answered = answer(request, ApiError(status, message))
        answered.headers.update(getattr(error, "headers", None) or {})  # Allow, beside 405
        return answered

    for status in (400, 404, 405):
        app.exception_handler(status)(on_http_error)

    @app.exception_handler(Exception)
    async def on_unforeseen_error(request: Request, error: Exception) -> Response:
        return answer(request, unforeseen())  # the guard writes it to the log
