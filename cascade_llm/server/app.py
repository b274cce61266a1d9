"""The API: what each path answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse

from cascade_llm import __version__
from cascade_llm.errors import CascadeError, WorkerError
from cascade_llm.server.answer_forms import AnswerForm, ChatForm, CompletionForm
from cascade_llm.server.answer_response import AnswerResponse
from cascade_llm.server.answer_schema import (
    AnthropicErrorAnswer,
    Chat,
    Completion,
    Detokenized,
    Health,
    InputTokens,
    Message,
    Model,
    Models,
    Readiness,
    Tokenized,
    TokenizerInfo,
    Version,
)
from cascade_llm.server.anthropic_body import MessagesBody, MessagesPrompt
from cascade_llm.server.anthropic_form import MessagesForm
from cascade_llm.server.api_errors import ApiError, api_error, unforeseen
from cascade_llm.server.engine_client import EngineClient, EngineStatus
from cascade_llm.server.event_schema import CHAT_EVENTS, COMPLETION_EVENTS, MESSAGE_EVENTS, event_stream
from cascade_llm.server.guard import ENDLESS_PATH, OPEN_PATHS, Application, Guard, OnEnd, RequestRecord
from cascade_llm.server.keys import KeyRing
from cascade_llm.server.metrics import CONTENT_TYPE, ServerMetrics
from cascade_llm.server.options import ServerOptions
from cascade_llm.server.page_files import PAGE_PATHS, add_page
from cascade_llm.server.published import Answers, answers, error_answers, openapi_document, other_answers
from cascade_llm.server.quotas import RATE_HEADERS, QuotaKeeper
from cascade_llm.server.schema import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    refuse_other_models,
    refuse_unknown_fields,
    wrong_body,
)
from cascade_llm.server.session_paths import add_session_paths
from cascade_llm.server.sharing_feed import SharingFeed, SharingResponse
from cascade_llm.server.sharing_schema import SHARING_EVENTS
from cascade_llm.server.tracing import asked_attributes

if TYPE_CHECKING:  # imports torch: see `run`
    from cascade_llm.server.reading import ReadBody, RequestReader

__all__ = ["Api", "build_application"]

Result = TypeVar("Result")
ASKED_FOR_S = 5.0
"""How long the live view waits for a step to end."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
UNSUPPORTED = {"/v1/embeddings": "embeddings are not computed: this server generates text"}
"""Paths that clients know and this server refuses."""


class Api:
    """What the paths share: one engine, one reader of bodies."""

    def __init__(self, engine: EngineClient, options: ServerOptions, keys: KeyRing) -> None:
        self.engine, self.options, self.keys, self.metrics = engine, options, keys, ServerMetrics()
        self._quotas: dict[str, QuotaKeeper] = {}
        self._feeds: dict[str | None, SharingFeed] = {}
        self.reader: RequestReader | None = None
        """There once the model is loaded."""
        self._started = int(time.time())

    @property
    def names(self) -> Sequence[str]:
        """What the model may be called."""
        if self.options.served_model_name:
            return list(self.options.served_model_name)
        return [self.engine.facts.model_name] if self.engine.facts else []

    def ready_reader(self, body: Body) -> RequestReader:
        """The reader, for a body that names this model. Raises `ApiError`."""
        if self.options.strict:
            refuse_unknown_fields(body)
        if self.reader is None or self.engine.status is not EngineStatus.READY:
            reason = self.engine.failure or "the model is being loaded"
            raise ApiError(503, f"{reason}: try again later", code="engine_unavailable")
        refuse_other_models(body, self.names)
        return self.reader

    async def generate(
        self,
        body: GenerationBody,
        record: RequestRecord,
        prefix: str,
        form: type[AnswerForm],
        read: Callable[[RequestReader], ReadBody],
    ) -> Response:
        """Read a body, hand its requests over, and answer with what they gain."""
        reader, visitor = self.ready_reader(body), record.visitor
        quota = self._quotas.setdefault(visitor.client.name, QuotaKeeper(visitor.quota))
        quota.check()
        self._check_room(1)
        priority = visitor.priority(body.priority)
        items = replace(await _beside(lambda: read(reader)), priority=priority)
        self._check_room(items.num_samples)
        is_streamed = bool(body.stream)
        lease = quota.take(items.most_tokens)
        answer_id = f"{prefix}-{record.request_id}"
        record.attributes |= asked_attributes(form.operation, self.names[0], answer_id, items.all_params[0])
        try:
            answers = self.engine.submit(reader.requests(items, visitor.client), only_whole=not is_streamed)
        except CascadeError as error:
            lease.settle(0)
            raise api_error(error) from None
        record.headers |= quota.headers
        options = body.stream_options
        answer_form = form(
            answer_id,
            self.names[0],
            items,
            reader.tokenizer,
            include_usage=options is not None and bool(options.include_usage),
            usage_so_far=options is not None and bool(options.continuous_usage_stats),
            with_token_ids=bool(body.return_token_ids),
        )
        return AnswerResponse(
            self.engine,
            answers,
            answer_form,
            self.metrics,
            record,
            lease=lease,
            is_streamed=is_streamed,
            timeout_s=self.options.request_timeout,
        )

    def _check_room(self, num_samples: int) -> None:
        assert self.engine.facts is not None
        num_open = self.engine.num_open_samples
        most = self.engine.facts.max_num_seqs + self.options.max_queue
        if num_open + num_samples > most:
            raise ApiError(429, f"{num_open} samples run or wait already: try again later", code="queue_full")

    def models(self) -> Models:
        """GET /v1/models."""
        length = self.engine.facts.max_model_len if self.engine.facts else None
        return Models(data=[Model(id=name, created=self._started, max_model_len=length) for name in self.names])

    async def health(self) -> Response:
        """GET /health: 200 while the engine's loop is alive, or the model is being loaded."""
        status = self.engine.status
        if status is EngineStatus.STARTING:
            return JSONResponse({"status": "starting"})
        try:
            stalled_s = (await self.engine.ask("health"))["stalled_s"]
        except WorkerError as error:
            return JSONResponse({"status": "failed", "reason": str(error)}, 503)
        if stalled_s > self.options.step_timeout:
            return JSONResponse({"status": "stalled", "reason": f"a step runs for {stalled_s:.1f} s"}, 503)
        return JSONResponse({"status": "ok"})

    def ready(self) -> Response:
        """GET /ready: 200 where a request would be taken."""
        is_ready = self.reader is not None and self.engine.status is EngineStatus.READY
        return JSONResponse({"ready": is_ready, "engine": self.engine.status.value}, 200 if is_ready else 503)

    async def metrics_text(self, request: Request) -> Response:
        """GET /metrics: of all tenants together, so for none of them."""
        if _record(request).visitor.client.tenant:
            raise ApiError(403, "metrics count all tenants: ask with a key that has none", code="forbidden")
        try:
            stats = await self.engine.ask("stats")
        except WorkerError:
            stats = None
        self.metrics.open_samples.set(self.engine.num_open_samples)
        self.metrics.restarts.set(self.engine.num_restarts)
        return Response(self.metrics.text(stats), media_type=CONTENT_TYPE)

    def sharing_events(self, request: Request) -> Response:
        """GET /v1/cascade/events: what the engine shares, as server-sent events, for as long as the client stays.

        Where keys have tenants, each is told of its own.
        """
        tenant = _record(request).visitor.client.tenant if self.keys.has_tenants else None
        return SharingResponse(self._feeds.setdefault(tenant, SharingFeed(partial(self._sharing, tenant))))

    def close_feeds(self) -> None:
        """End all streams of the live view."""
        for feed in self._feeds.values():
            feed.close()

    async def _sharing(self, tenant: str | None) -> dict[str, Any]:
        """One event: lengths and counts, and how shared runs begin only with `show_text`."""
        status = self.engine.status.value
        if self.engine.status is not EngineStatus.READY:
            return {"engine": status}
        tokenizer = self.reader.tokenizer if self.options.show_text and self.reader is not None else None
        told = await self.engine.ask(
            "sharing" if tokenizer is None else "sharing_with_tokens", ASKED_FOR_S, tenant=tenant
        )
        if tokenizer is not None:
            for tree in (told["cache"], *(told["last_step"] or {}).get("kinds", ())):
                _add_texts(tree, tokenizer)
        return {"engine": status, **told}

    async def tokenize(self, body: TokenizeBody) -> Tokenized:
        """POST /tokenize."""
        reader = self.ready_reader(body)
        prompt, messages = body.prompt, body.messages
        if (prompt is None) == (messages is None):
            raise ApiError(400, "give prompt or messages, one of them", param="prompt")
        if messages is not None:
            with_prompt = body.add_generation_prompt is not False
            kwargs, tools = body.chat_template_kwargs, body.tools
            ids = await _beside(lambda: reader.tokenize_chat(messages, kwargs, tools=tools, add_prompt=with_prompt))
        else:
            tokenizer, add_special = _tokenizer(reader), body.add_special_tokens is not False
            ids = await _beside(lambda: tokenizer.encode(str(prompt), add_special))
        return Tokenized(tokens=ids, count=len(ids), max_model_len=reader.max_model_len)

    def tokenizer_info(self) -> TokenizerInfo:
        """GET /tokenizer_info."""
        tokenizer = _tokenizer(self.ready_reader(Body(model=None)))
        named = {name: tokenizer.special_tokens.get(name) for name in SPECIAL_TOKENS}
        return TokenizerInfo(**named, chat_template=tokenizer.chat_template)

    async def detokenize(self, body: DetokenizeBody) -> Detokenized:
        """POST /detokenize."""
        tokenizer = _tokenizer(self.ready_reader(body))
        if not all(0 <= token < 1 << 31 for token in body.tokens):
            raise ApiError(400, "tokens must be token ids, 0 or larger", param="tokens")
        return Detokenized(prompt=await _beside(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False)))


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
        record = _record(request)
        return await api.generate(body, record, "cmpl", CompletionForm, lambda reader: reader.read_completion(body))

    pieces = event_stream(CHAT_EVENTS, has_names=False)

    @app.post("/v1/chat/completions", response_model=None, responses=answers(Chat, pieces, *statuses))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer a conversation."""
        record = _record(request)
        return await api.generate(body, record, "chatcmpl", ChatForm, lambda reader: reader.read_chat(body))

    events = event_stream(MESSAGE_EVENTS, has_names=True)
    in_anthropic_form = answers(Message, events, *statuses, form=AnthropicErrorAnswer)

    @app.post("/v1/messages", response_model=None, responses=in_anthropic_form)
    async def messages(body: MessagesBody, request: Request) -> Response:
        """Answer a conversation, as Anthropic's clients ask."""
        record = _record(request)
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
        ids = await _beside(
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


def _record(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope["state"]["record"]
    return record


def _tokenizer(reader: RequestReader) -> Any:
    if reader.tokenizer is None:
        raise ApiError(400, "this checkpoint has no tokenizer: token ids only", code="unsupported")
    return reader.tokenizer


def _add_texts(node: dict[str, Any], tokenizer: Any) -> None:
    """Write the token ids of a tree's runs as text."""
    for run in node["runs"]:
        if (ids := run.pop("token_ids", None)) is not None:
            run["text"] = tokenizer.decode(ids, skip_special_tokens=False)
        _add_texts(run, tokenizer)


async def _beside(read: Callable[[], Result]) -> Result:
    """Read something beside the loop. Raises `ApiError` for every error that a client can mend."""
    try:
        return await asyncio.to_thread(read)
    except CascadeError as error:
        raise api_error(error) from None
