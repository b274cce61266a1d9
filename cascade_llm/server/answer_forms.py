"""What requests gained, as OpenAI's answers: whole, or piece by piece."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from cascade_llm.engine.output_queue import RequestGain
from cascade_llm.outputs import CompletionDelta, RequestMetrics, TokenLogprob
from cascade_llm.server.api_errors import ApiError, error_body
from cascade_llm.server.event_schema import DONE
from cascade_llm.server.tool_calls import ToolCall, ToolCallReader

if TYPE_CHECKING:
    from cascade_llm.engine.tokenizer import Tokenizer
    from cascade_llm.server.reading import ReadBody

__all__ = ["AnswerForm", "ChatForm", "CompletionForm", "Tally"]

FINISH_REASONS = {"stop": "stop", "length": "length", "abort": "stop"}


@dataclass(slots=True)
class Tally:
    """How many tokens an answer took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: list[int] = field(default_factory=list)
    """One per prompt."""
    metrics: RequestMetrics | None = None
    """Of all prompts that have ended."""
    finish_reasons: set[str] = field(default_factory=set)
    """Why samples ended."""

    def add(self, place: int, gain: RequestGain) -> int:
        """Count a gain; returns its tokens."""
        num_tokens = sum(len(delta.token_ids) for delta in gain.deltas)
        self.completion_tokens += num_tokens
        self.finish_reasons |= {delta.finish_reason for delta in gain.deltas if delta.finish_reason is not None}
        self.cached_tokens[place] = max(self.cached_tokens[place], gain.num_cached_tokens)
        if gain.metrics is not None:
            self.metrics = self.metrics or RequestMetrics()
            self.metrics.add(gain.metrics)
        return num_tokens

    def usage(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached_tokens)},
            **self.cascade(),
        }

    def cascade(self) -> dict[str, Any]:
        """{"cascade": what was read and shared}; empty where that is not known."""
        metrics = self.metrics
        if metrics is None:
            return {}
        return {
            "cascade": {
                "steps": metrics.num_steps,
                "shared_steps": metrics.num_shared_steps,
                "levels": metrics.num_levels,
                "group_size": metrics.group_size,
                "kv_bytes_read": metrics.kv_bytes_read,
                "kv_bytes_saved": metrics.kv_bytes_saved,
            }
        }


class AnswerForm:
    """One answer's form. A choice is a sample of a prompt; those of the first prompt come first."""

    whole_object = chunk_object = ""
    operation = "chat"
    """Its name in the conventions for spans."""

    def __init__(
        self,
        answer_id: str,
        model: str,
        body: ReadBody,
        tokenizer: Tokenizer | None,
        *,
        include_usage: bool = False,
        usage_so_far: bool = False,
        with_token_ids: bool = False,
    ) -> None:
        self._id, self._model, self._body, self._tokenizer = answer_id, model, body, tokenizer
        self._created = int(time.time())
        self._include_usage, self._usage_so_far = include_usage, usage_so_far
        self._with_token_ids = with_token_ids
        self.tally = Tally(sum(map(len, body.prompts)), cached_tokens=[0] * len(body.prompts))
        self._begun: set[int] = set()
        self._readers: dict[int, ToolCallReader] = {}
        self._num_calls: defaultdict[int, int] = defaultdict(int)

    def whole(self, gains: Sequence[RequestGain]) -> dict[str, Any]:
        """The answer of requests that have ended, one gain each."""
        choices = []
        for place, gain in enumerate(gains):
            for delta in sorted(gain.deltas, key=lambda delta: delta.index):
                choice = {"index": self._index(place, delta), **self._whole_choice(place, gain, delta)}
                choices.append(self._finished(choice, delta))
        return {**self._head(self.whole_object), "choices": choices, "usage": self.tally.usage()}

    def pieces(self, place: int, gain: RequestGain) -> Iterator[dict[str, Any]]:
        """What a gain adds, one choice a piece."""
        for delta in gain.deltas:
            index = self._index(place, delta)
            is_first = index not in self._begun
            self._begun.add(index)
            for content in self._contents(place, gain, delta, is_first):
                yield self._piece([self._finished({"index": index, **content}, delta)])

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The piece that ends a stream early."""
        return error_body(error)

    def events(self, pieces: Sequence[dict[str, Any]]) -> bytes:
        """Pieces as server-sent events."""
        return b"".join(b"data: " + msgspec.json.encode(piece) + b"\n\n" for piece in pieces)

    def end(self) -> bytes:
        """The events after all pieces: the usage, where it was asked for, and a mark."""
        last = {**self._head(self.chunk_object), "choices": [], "usage": self.tally.usage()}
        return self.events([last] if self._include_usage else []) + b"data: " + DONE.encode() + b"\n\n"

    def _index(self, place: int, delta: CompletionDelta) -> int:
        return place * self._body.all_params[0].n + delta.index

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        piece = {**self._head(self.chunk_object), "choices": choices}
        if self._include_usage:
            piece["usage"] = self.tally.usage() if self._usage_so_far else None
        return piece

    def _finished(self, choice: dict[str, Any], delta: CompletionDelta) -> dict[str, Any]:
        reason = delta.finish_reason
        if reason == "stop" and self._num_calls[choice["index"]]:
            reason = "tool_calls"
        choice["finish_reason"] = None if reason is None else FINISH_REASONS.get(reason, reason)
        if self._with_token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _says_something(self, delta: CompletionDelta, is_first: bool) -> bool:
        """Whether a piece is worth sending: the text of some tokens is held back."""
        told = delta.logprobs or (delta.token_ids if self._with_token_ids else ())
        return bool(delta.text or delta.finish_reason or told or is_first)

    def _said_and_called(self, index: int, delta: CompletionDelta) -> tuple[str, Sequence[ToolCall]]:
        """What of a delta is text, and the calls that are whole with it."""
        form = self._body.tool_form
        if form is None:
            return delta.text, ()
        reader = self._readers.setdefault(index, ToolCallReader(form))
        text, calls = reader.push(delta.text, finished=delta.finish_reason is not None)
        if self._body.is_one_call:
            calls = calls[: max(0, 1 - self._num_calls[index])]
        self._num_calls[index] += len(calls)
        return text, calls

    def _token(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def _whole_choice(self, place: int, gain: RequestGain, delta: CompletionDelta) -> dict[str, Any]:
        raise NotImplementedError

    def _contents(
        self, place: int, gain: RequestGain, delta: CompletionDelta, is_first: bool
    ) -> Iterator[dict[str, Any]]:
        raise NotImplementedError


class CompletionForm(AnswerForm):
    """/v1/completions."""

    whole_object = chunk_object = operation = "text_completion"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._offsets: defaultdict[int, int] = defaultdict(int)

    def _whole_choice(self, place: int, gain: RequestGain, delta: CompletionDelta) -> dict[str, Any]:
        return self._text_choice(place, gain, delta, is_first=True)

    def _contents(
        self, place: int, gain: RequestGain, delta: CompletionDelta, is_first: bool
    ) -> Iterator[dict[str, Any]]:
        if self._says_something(delta, is_first):
            yield self._text_choice(place, gain, delta, is_first)

    def _text_choice(self, place: int, gain: RequestGain, delta: CompletionDelta, is_first: bool) -> dict[str, Any]:
        echoed = self._body.texts[place] if is_first else None
        choice: dict[str, Any] = {"text": (echoed or "") + delta.text, "logprobs": None}
        if self._body.all_params[place].logprobs is None:
            return choice
        ids, logprobs = list(delta.token_ids), list[TokenLogprob | None](delta.logprobs or [])
        if echoed is not None:
            prompt_ids = list(self._body.prompts[place])
            scored = gain.prompt_logprobs or [None] * len(prompt_ids)
            ids, logprobs = prompt_ids + ids, list(scored) + logprobs
        choice["logprobs"] = self._logprobs(self._index(place, delta), ids, logprobs)
        return choice

    def _logprobs(self, index: int, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        tokens, offsets = [self._token(token_id) for token_id in ids], []
        for token in tokens:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if item is None else item.logprob for item in logprobs],
            "top_logprobs": [None if item is None else self._top(item) for item in logprobs],
            "text_offset": offsets,
        }

    def _top(self, item: TokenLogprob) -> dict[str, float]:
        top = {self._token(token_id): logprob for token_id, logprob in reversed(item.top)}  # the best wins a name
        return dict(reversed(top.items())) | {self._token(item.token_id): item.logprob}


class ChatForm(AnswerForm):
    """/v1/chat/completions."""

    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def _whole_choice(self, place: int, gain: RequestGain, delta: CompletionDelta) -> dict[str, Any]:
        text, calls = self._said_and_called(self._index(place, delta), delta)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message |= {"content": text or None, "tool_calls": [_openai_call(call) for call in calls]}
        return {"message": message, "logprobs": self._logprobs(delta)}

    def _contents(
        self, place: int, gain: RequestGain, delta: CompletionDelta, is_first: bool
    ) -> Iterator[dict[str, Any]]:
        index = self._index(place, delta)
        num_before = self._num_calls[index]
        text, calls = self._said_and_called(index, delta)
        content: dict[str, Any] = {"role": "assistant"} if is_first else {}
        if is_first or text:
            content["content"] = text
        if calls:
            content["tool_calls"] = [{"index": i, **_openai_call(call)} for i, call in enumerate(calls, num_before)]
        if content or self._says_something(replace(delta, text=text), is_first):
            yield {"delta": content, "logprobs": self._logprobs(delta)}

    def _logprobs(self, delta: CompletionDelta) -> dict[str, Any] | None:
        if delta.logprobs is None:
            return None
        return {
            "content": [
                {
                    **self._named(item.token_id, item.logprob),
                    "top_logprobs": [self._named(*pair) for pair in item.top],
                }
                for item in delta.logprobs
            ]
        }

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        token = self._token(token_id)
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _openai_call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
