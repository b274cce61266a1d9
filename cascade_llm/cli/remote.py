"""`--url`: the model is another server's, and so are its engine's options."""

from __future__ import annotations

import http.client
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from cascade_llm.bench.openai_server import OpenAIServer
from cascade_llm.cli.field_options import stacked
from cascade_llm.errors import ConfigError, GenerationError
from cascade_llm.outputs import CompletionDelta, CompletionOutput, RequestOutput
from cascade_llm.sampling_params import SamplingParams

__all__ = ["RemoteModel", "Server", "asked_model", "remote_options", "take_remote"]

MOST_CONNECTIONS = 64
FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)
"""What a server that is gone, refuses, or speaks something else comes to."""
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEFAULTS = SamplingParams()
NOT_TOLD = ("logprobs", "prompt_logprobs", "prompt_logprobs_start", "split_special_tokens")
TEMPLATE_FIELDS = ("chat_template_kwargs", "continue_final_message")

remote_options = stacked(
    click.option("--url", help="Ask this server, which speaks OpenAI's protocol, instead of loading a model."),
    click.option("--api-key", envvar="OPENAI_API_KEY", help="Sent to --url as a bearer token."),
)
"""Collect them with `take_remote`; --model is then a name of the server's."""


class Server(NamedTuple):
    """What --url and --api-key say."""

    url: str
    api_key: str | None


def take_remote(arguments: dict[str, Any], engine: Mapping[str, Any]) -> Server | None:
    """Remove the options from a command's arguments. Raises `ConfigError` for options of an engine beside --url."""
    url, api_key = arguments.pop("url"), arguments.pop("api_key")
    if url is None:
        return None
    if engine:
        flag = next(iter(engine)).replace("_", "-")
        raise ConfigError(f"--{flag} goes with a model that is loaded here: with --url it is the server's to say")
    return Server(url, api_key)


def asked_model() -> str | None:
    """--model where the command line has it: its default names what is loaded here."""
    context = click.get_current_context()
    is_given = context.get_parameter_source("model") is not ParameterSource.DEFAULT
    return context.params["model"] if is_given else None


class RemoteModel:
    """One model of a server. Raises `BackendError` where nothing answers, or has that model."""

    def __init__(self, server: Server, model: str | None, params: SamplingParams, template: Mapping[str, Any]) -> None:
        """`model`: None takes the server's first; `template` as `LLM.chat` takes it."""
        for name in NOT_TOLD:
            if getattr(params, name) != getattr(DEFAULTS, name):
                raise ConfigError(f"--{name.replace('_', '-')} does not go with --url: leave it out")
        if unknown := [name for name in template if name not in TEMPLATE_FIELDS]:
            raise ConfigError(f"--{unknown[0].replace('_', '-')} does not go with --url: the server has its template")
        self._server = OpenAIServer(server.url, model=model, api_key=server.api_key)
        self.name = self._server.model
        self._params, self._template = params, dict(template)
        if template.get("continue_final_message"):
            self._template["add_generation_prompt"] = False

    def complete(self, contents: Sequence[Any], *, as_chat: bool) -> list[RequestOutput]:
        """An output per prompt or conversation, many asked at once; an error is in its output."""
        with ThreadPoolExecutor(min(MOST_CONNECTIONS, len(contents))) as pool:
            try:
                return list(pool.map(lambda content: self._complete(content, as_chat), contents))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def stream_chat(self, messages: Sequence[Mapping[str, Any]]) -> Generator[CompletionDelta, None, None]:
        """What the answer to a conversation gains. Raises `GenerationError`."""
        body = {**self._body(), **self._template, "messages": list(messages), "stream": True}
        try:
            for event in self._server.stream(CHAT, body):
                if "error" in event:
                    raise ValueError(event["error"].get("message"))
                for choice in event.get("choices") or ():
                    text = (choice.get("delta") or {}).get("content") or ""
                    yield CompletionDelta(0, str(text), [], choice.get("finish_reason"))
        except FAILURES as error:
            raise self._failed(error) from None

    def _complete(self, content: Any, as_chat: bool) -> RequestOutput:
        text = content if isinstance(content, str) else None
        asked = {**self._template, "messages": content} if as_chat else {"prompt": content}
        try:
            answer = self._server.ask(CHAT if as_chat else COMPLETIONS, {**self._body(), **asked})
            samples = [_sample(index, choice) for index, choice in enumerate(answer["choices"])]
            details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
            num_cached = details.get("cached_tokens") or 0
            if not samples:
                raise ValueError("the answer has no choices")
            return RequestOutput(str(answer.get("id")), text, [], samples, num_cached)
        except FAILURES as error:
            return RequestOutput("", text, [], [CompletionOutput(0, finish_reason="error")], error=self._failed(error))

    def _body(self) -> dict[str, Any]:
        """The fields that differ from the defaults, and those whose defaults a server may see otherwise."""
        values = {field.name: getattr(self._params, field.name) for field in fields(self._params)}
        always = ("max_tokens", "temperature")
        body = {name: value for name, value in values.items() if name in always or value != getattr(DEFAULTS, name)}
        return {"model": self.name, **body}

    def _failed(self, error: BaseException) -> GenerationError:
        reason = " ".join(str(error).split()) or type(error).__name__
        return GenerationError(f"{self._server.url}: {reason}")


def _sample(index: int, choice: Mapping[str, Any]) -> CompletionOutput:
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return CompletionOutput(index, text or "", finish_reason=choice.get("finish_reason"))
