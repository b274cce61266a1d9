"""What a request gained, as Anthropic's answers: whole, or event by event."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from cascade_llm.engine.output_queue import RequestGain
from cascade_llm.outputs import CompletionDelta
from cascade_llm.server.answer_forms import AnswerForm
from cascade_llm.server.api_errors import ApiError, anthropic_error_body
from cascade_llm.server.tool_calls import ToolCall

__all__ = ["MessagesForm"]


class MessagesForm(AnswerForm):
    """/v1/messages: one prompt, one sample; blocks of text and calls."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._num_blocks = 0
        self._is_text_open = False

    def whole(self, gains: Sequence[RequestGain]) -> dict[str, Any]:
        """The message of a request that has ended."""
        (delta,) = gains[0].deltas
        text, calls = self._said_and_called(0, delta)
        blocks = [_text_block(text)] if text or not calls else []
        blocks += [{**_tool_block(call), "input": msgspec.json.decode(call.arguments)} for call in calls]
        return {**self._message(blocks, self.tally.completion_tokens), **self._ending(delta)}

    def pieces(self, place: int, gain: RequestGain) -> Iterator[dict[str, Any]]:
        """What a gain adds, each with its event's name as `type`."""
        for delta in gain.deltas:
            text, calls = self._said_and_called(0, delta)
            if not self._begun:
                self._begun.add(delta.index)
                yield {"type": "message_start", "message": self._message([], 0)}
                if self._body.tool_form is None:  # else the first block may be a call
                    yield self._open_text()
                yield {"type": "ping"}
            if text:
                if not self._is_text_open:
                    yield self._open_text()
                content = {"type": "text_delta", "text": text}
                yield {"type": "content_block_delta", "index": self._num_blocks, "delta": content}
            for call in calls:
                yield from self._close_text()
                yield from self._call(call)
            if delta.finish_reason is not None:
                yield from self._close_text()
                usage = {"output_tokens": self.tally.completion_tokens, **self.tally.cascade()}
                yield {"type": "message_delta", "delta": self._ending(delta), "usage": usage}
                yield {"type": "message_stop"}

    def _open_text(self) -> dict[str, Any]:
        self._is_text_open = True
        return {"type": "content_block_start", "index": self._num_blocks, "content_block": _text_block("")}

    def _close_text(self) -> Iterator[dict[str, Any]]:
        if self._is_text_open:
            yield {"type": "content_block_stop", "index": self._num_blocks}
            self._num_blocks, self._is_text_open = self._num_blocks + 1, False

    def _call(self, call: ToolCall) -> Iterator[dict[str, Any]]:
        index = self._num_blocks
        self._num_blocks += 1
        yield {"type": "content_block_start", "index": index, "content_block": {**_tool_block(call), "input": {}}}
        content = {"type": "input_json_delta", "partial_json": call.arguments}
        yield {"type": "content_block_delta", "index": index, "delta": content}
        yield {"type": "content_block_stop", "index": index}

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The piece that ends a stream early."""
        return anthropic_error_body(error)

    def events(self, pieces: Sequence[dict[str, Any]]) -> bytes:
        """Pieces as server-sent events with names."""
        return b"".join(
            b"event: " + piece["type"].encode() + b"\ndata: " + msgspec.json.encode(piece) + b"\n\n" for piece in pieces
        )

    def end(self) -> bytes:
        """Nothing: message_stop was the last."""
        return b""

    def _message(self, content: list[dict[str, Any]], num_generated: int) -> dict[str, Any]:
        num_cached = sum(self.tally.cached_tokens)
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {
                "input_tokens": self.tally.prompt_tokens - num_cached,  # the others are beside them, not among them
                "cache_read_input_tokens": num_cached,
                "cache_creation_input_tokens": 0,
                "output_tokens": num_generated,
                **self.tally.cascade(),
            },
        }

    def _ending(self, delta: CompletionDelta) -> dict[str, Any]:
        """Why it ended. A stop sequence that is a special token ends a text by the token's id."""
        stop = delta.stop_reason
        text = self._token(stop) if isinstance(stop, int) else stop
        if text is not None and text in self._body.all_params[0].stop_strings:
            return {"stop_reason": "stop_sequence", "stop_sequence": text}
        ended_by_itself = "tool_use" if self._num_calls[0] else "end_turn"
        reason = "max_tokens" if delta.finish_reason == "length" else ended_by_itself
        return {"stop_reason": reason, "stop_sequence": None}


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _tool_block(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.call_id, "name": call.name}
