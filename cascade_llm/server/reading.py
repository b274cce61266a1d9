"""From a body to requests that the engine takes; tokenizes, so it runs beside the API process's loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from cascade_llm.engine.input_processor import InputProcessor, Prompt, ReadPrompt
from cascade_llm.engine.tokenizer import Tokenizer
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sequence import Client, Request
from cascade_llm.scheduler.sessions import SessionUse
from cascade_llm.server.api_errors import ApiError
from cascade_llm.server.messages import EngineFacts
from cascade_llm.server.options import ServerOptions
from cascade_llm.server.schema import ChatBody, CompletionBody, GenerationBody
from cascade_llm.server.tool_calls import ToolForm
from cascade_llm.server.tool_fields import asked_tools, tool_form, with_read_arguments

__all__ = ["ReadBody", "RequestReader"]

COMPLETION_TOKENS = 16
"""max_tokens of /v1/completions where it is not given, as OpenAI has it; a chat may fill the context."""
MOST_TOP_LOGPROBS = 20


@dataclass(frozen=True, kw_only=True)
class ReadBody:
    """The prompts of one body, checked, and how they are to be continued."""

    prompts: Sequence[Sequence[int]]
    texts: Sequence[str | None]
    """What `echo` gives back."""
    all_params: Sequence[SamplingParams]
    priority: int
    session: SessionUse | None = None
    cache_salt: bytes = b""
    tool_form: ToolForm | None = None
    """How the answer calls tools; None where it is text whatever it says."""
    is_one_call: bool = False
    """Whether only the first call counts."""

    @property
    def num_samples(self) -> int:
        """All that is generated."""
        return sum(params.n for params in self.all_params)

    @property
    def most_tokens(self) -> int:
        """Of all prompts, and all that may be generated."""
        return sum(len(p) + s.n * s.max_tokens for p, s in zip(self.prompts, self.all_params, strict=True))


class RequestReader:
    """Reads bodies for one model. `read_*` may run in any thread, `requests` in one."""

    def __init__(self, tokenizer: Tokenizer | None, facts: EngineFacts, options: ServerOptions) -> None:
        self.tokenizer, self._facts, self._options = tokenizer, facts, options
        self._input = InputProcessor(
            tokenizer,
            vocab_size=facts.vocab_size,
            max_model_len=facts.max_model_len,
            ending_token_ids=frozenset(facts.ending_token_ids),
            seed=facts.seed,
        )
        self._most_output = options.max_output_len or facts.max_model_len

    @property
    def max_model_len(self) -> int:
        """The context."""
        return self._facts.max_model_len

    def read_completion(self, body: CompletionBody) -> ReadBody:
        """The prompts of /v1/completions. Raises `RequestError`, `ApiError`."""
        if body.suffix:
            raise ApiError(400, "suffix is not supported: leave it out", param="suffix", code="unsupported_field")
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise ApiError(400, "best_of must be n: nothing is chosen from", param="best_of", code="unsupported_field")
        params = self._params(body, COMPLETION_TOKENS, body.max_tokens, body.logprobs)
        if body.echo and (body.logprobs is not None or body.max_tokens == 0):
            params["prompt_logprobs"] = body.logprobs or 0
        if body.split_special_tokens is not None:
            params["split_special_tokens"] = body.split_special_tokens
        sampling, priority = SamplingParams(**params), body.priority or 0
        self._input.check(sampling, priority)
        prompts = _as_many(body.prompt)
        self._check_count(len(prompts) * sampling.n)
        read = [self._input.read_prompt(prompt, sampling) for prompt in prompts]
        for item in read:
            self._check_length(item.token_ids)
        texts = [self._echoed(item.text, item.token_ids) if body.echo else None for item in read]
        return ReadBody(
            prompts=[item.token_ids for item in read],
            texts=texts,
            all_params=[sampling] * len(read),
            priority=priority,
            session=self._session(body, len(read), sampling.n),
            cache_salt=_salt(body),
        )

    def read_chat(self, body: ChatBody) -> ReadBody:
        """The prompt of /v1/chat/completions. Raises `RequestError`, `ApiError`."""
        self._refuse_unsupported(body)
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MOST_TOP_LOGPROBS:
            raise ApiError(400, f"top_logprobs must be 0 to {MOST_TOP_LOGPROBS}", param="top_logprobs")
        logprobs = body.top_logprobs or 0 if body.logprobs else None
        params = self._params(body, self._most_output, asked, logprobs)
        tools = asked_tools(body.tools, body.tool_choice)
        form = None if tools is None else tool_form(self.tokenizer)
        if form is not None and form.has_special_tokens:
            params.setdefault("skip_special_tokens", False)
        sampling, priority = SamplingParams(**params, split_special_tokens=True), body.priority or 0
        self._input.check(sampling, priority)
        self._check_count(sampling.n)
        arguments = _template_arguments(
            body.chat_template_kwargs, body.add_generation_prompt is not False, bool(body.continue_final_message), tools
        )
        if body.chat_template is not None:
            arguments["chat_template"] = body.chat_template
        read = self._input.read_chat(with_read_arguments(body.messages), arguments, sampling)
        self._check_length(read.token_ids)
        if asked is None:
            left = max(1, self.max_model_len - len(read.token_ids))
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, left))
        return ReadBody(
            prompts=[read.token_ids],
            texts=[None],
            all_params=[sampling],
            priority=priority,
            session=self._session(body, 1, sampling.n),
            cache_salt=_salt(body),
            tool_form=form,
            is_one_call=body.parallel_tool_calls is False,
        )

    def tokenize_chat(
        self,
        messages: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        tools: Sequence[object] | None = None,
        add_prompt: bool = True,
        is_continued: bool = False,
    ) -> list[int]:
        """The token ids of a conversation, its last message whole or to be continued. As `read_chat` raises."""
        asked = asked_tools(tools, None)
        if asked is not None:
            tool_form(self.tokenizer)
        arguments = _template_arguments(kwargs, add_prompt, is_continued, asked)
        sampling = SamplingParams(split_special_tokens=True)
        return self._input.read_chat(with_read_arguments(messages), arguments, sampling).token_ids

    def requests(self, body: ReadBody, client: Client) -> list[Request]:
        """Requests with ids and seeds of their own, one per prompt."""
        requests = [
            self._input.request(ReadPrompt(None, list(prompt)), params, body.priority)
            for prompt, params in zip(body.prompts, body.all_params, strict=True)
        ]
        return [
            replace(request, session=body.session, client=client, cache_salt=body.cache_salt) for request in requests
        ]

    def _session(self, body: GenerationBody, num_prompts: int, num_samples: int) -> SessionUse | None:
        """The session of which a body is a turn."""
        session_id, fork_of = body.session_id, body.fork_of
        if session_id is None:
            if fork_of is not None:
                raise ApiError(400, "fork_of needs the branch's own session_id beside it", param="fork_of")
            return None
        if num_prompts != 1 or num_samples != 1:
            raise ApiError(400, "a session goes on with one answer: give one prompt, and n of 1", param="session_id")
        if not self._facts.has_prefix_cache:
            raise ApiError(
                400, "this server keeps no prefixes: leave session_id out", param="session_id", code="unsupported_field"
            )
        return SessionUse(session_id=session_id, fork_of=fork_of, drop_on_abort=bool(body.drop_session_on_disconnect))

    def _params(self, body: GenerationBody, default: int, asked: int | None, logprobs: int | None) -> dict[str, Any]:
        params = body.given_params()
        params["max_tokens"] = min(default, self._most_output) if asked is None else asked
        if params["max_tokens"] > self._most_output and self._options.max_output_len is not None:
            raise ApiError(
                400, f"max_tokens is {asked}: this server gives at most {self._most_output}", param="max_tokens"
            )
        if logprobs is not None:
            params["logprobs"] = logprobs
        return params

    def _check_count(self, num_samples: int) -> None:
        most = self._facts.max_num_seqs + self._options.max_queue
        if num_samples > most:
            raise ApiError(400, f"{num_samples} samples were asked for: this server takes at most {most}", param="n")

    def _check_length(self, token_ids: Sequence[int]) -> None:
        most = self._options.max_prompt_len
        if most is not None and len(token_ids) > most:
            raise ApiError(
                400,
                f"the prompt has {len(token_ids)} tokens: this server takes at most {most}, shorten it",
                code="context_length_exceeded",
            )

    def _echoed(self, text: str | None, token_ids: Sequence[int]) -> str:
        if text is not None:
            return text
        return self.tokenizer.decode(token_ids, skip_special_tokens=False) if self.tokenizer else ""

    def _refuse_unsupported(self, body: ChatBody) -> None:
        if body.chat_template is not None and not self._options.allow_chat_templates:
            raise ApiError(
                400,
                "chat_template: this server renders the model's own only, see --allow-chat-templates",
                param="chat_template",
                code="forbidden",
            )
        kind = (body.response_format or {}).get("type", "text")
        if kind != "text":
            raise ApiError(
                400,
                f"response_format {kind!r:.80} is not supported: leave it out, and ask for the form in a message",
                param="response_format",
                code="unsupported_field",
            )


def _salt(body: GenerationBody) -> bytes:
    return (body.cache_salt or "").encode("utf-8", "surrogatepass")


def _as_many(prompt: Any) -> Sequence[Prompt]:
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    if not prompt:
        raise ApiError(400, "prompt is empty: give a text or token ids", param="prompt")
    return cast(Sequence[Prompt], prompt)


def _template_arguments(
    kwargs: dict[str, Any] | None, add_prompt: bool, is_continued: bool, tools: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    arguments: dict[str, Any] = {"add_generation_prompt": add_prompt, "continue_final_message": is_continued}
    if tools is not None:
        arguments["tools"] = tools
    kwargs = kwargs or {}
    if taken := sorted({"messages", "tools", "chat_template", *arguments} & kwargs.keys()):
        raise ApiError(
            400, f"chat_template_kwargs has {taken[0]!r}: it is a field of its own", param="chat_template_kwargs"
        )
    return arguments | kwargs
