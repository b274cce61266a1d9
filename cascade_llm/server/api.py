"""What each path answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from cascade_llm.errors import CascadeError, WorkerError
from cascade_llm.server.answer_forms import AnswerForm
from cascade_llm.server.answer_response import AnswerResponse
from cascade_llm.server.answer_schema import Detokenized, Model, Models, Tokenized, TokenizerInfo
from cascade_llm.server.api_errors import ApiError, api_error
from cascade_llm.server.engine_client import EngineClient, EngineStatus
from cascade_llm.server.guard import RequestRecord
from cascade_llm.server.keys import KeyRing
from cascade_llm.server.metrics import CONTENT_TYPE, ServerMetrics
from cascade_llm.server.options import ServerOptions
from cascade_llm.server.quotas import QuotaKeeper
from cascade_llm.server.schema import (
    Body,
    DetokenizeBody,
    GenerationBody,
    TokenizeBody,
    refuse_other_models,
    refuse_unknown_fields,
)
from cascade_llm.server.sharing_feed import SharingFeed, SharingResponse
from cascade_llm.server.tracing import asked_attributes

if TYPE_CHECKING:  # imports torch: see `run`
    from cascade_llm.server.reading import ReadBody, RequestReader

__all__ = ["Api", "beside", "record_of"]

Result = TypeVar("Result")
ASKED_FOR_S = 5.0
"""How long the live view waits for a step to end."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


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
        items = replace(await beside(lambda: read(reader)), priority=priority)
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
        if record_of(request).visitor.client.tenant:
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
        tenant = record_of(request).visitor.client.tenant if self.keys.has_tenants else None
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
            ids = await beside(lambda: reader.tokenize_chat(messages, kwargs, tools=tools, add_prompt=with_prompt))
        else:
            tokenizer, add_special = _tokenizer(reader), body.add_special_tokens is not False
            ids = await beside(lambda: tokenizer.encode(str(prompt), add_special))
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
        return Detokenized(prompt=await beside(lambda: tokenizer.decode(body.tokens, skip_special_tokens=False)))


def record_of(request: Request) -> RequestRecord:
    """What the guard knows of a request."""
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


async def beside(read: Callable[[], Result]) -> Result:
    """Read something beside the loop. Raises `ApiError` for every error that a client can mend."""
    try:
        return await asyncio.to_thread(read)
    except CascadeError as error:
        raise api_error(error) from None
