"""What a request gained, as Anthropic's answers: whole, or event by event."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from cascade_llm.engine.output_queue import RequestGain
from cascade_llm.outputs import CompletionDelta
from cascade_llm.server.answer_forms import AnswerForm
from cascade_llm.server.api_errors import ApiError, anthropic_error_body

__all__ = ["MessagesForm"]


class MessagesForm(AnswerForm):
    """/v1/messages: one prompt, one sample, one block of text."""

    def whole(self, gains: Sequence[RequestGain]) -> dict[str, Any]:
        """The message of a request that has ended."""
        (delta,) = gains[0].deltas
        return {**self._message([_text_block(delta.text)], self.tally.completion_tokens), **self._ending(delta)}

    def pieces(self, place: int, gain: RequestGain) -> Iterator[dict[str, Any]]:
        """What a gain adds, each with its event's name as `type`."""
        for delta in gain.deltas:
            if not self._begun:
                self._begun.add(delta.index)
                yield {"type": "message_start", "message": self._message([], 0)}
                yield {"type": "content_block_start", "index": 0, "content_block": _text_block("")}
                yield {"type": "ping"}
            if delta.text:
                content = {"type": "text_delta", "text": delta.text}
                yield {"type": "content_block_delta", "index": 0, "delta": content}
            if delta.finish_reason is not None:
                yield {"type": "content_block_stop", "index": 0}
                usage = {"output_tokens": self.tally.completion_tokens, **self.tally.cascade()}
                yield {"type": "message_delta", "delta": self._ending(delta), "usage": usage}
                yield {"type": "message_stop"}

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
        reason = "max_tokens" if delta.finish_reason == "length" else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}


def _text_block(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
