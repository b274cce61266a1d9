"""What a request gained, on its way to a reader who may be slow."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from cascade_llm.outputs import CompletionDelta, RequestMetrics, TokenLogprob

__all__ = ["OutputQueue", "RequestGain"]


@dataclass(slots=True)
class RequestGain:
    """What one request gained since its reader was last told."""

    request_id: str
    deltas: list[CompletionDelta] = field(default_factory=list)
    """At most one per sample."""
    num_cached_tokens: int = 0
    """As in `RequestOutput`; known from the first delta on."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One per prompt token, with the first delta; None where they were not asked for."""
    metrics: RequestMetrics | None = None
    """As in `RequestOutput`, with the last gain."""
    finished: bool = False
    """Nothing follows."""
    error: str | None = None
    """Why it ended early."""

    def merge(self, later: RequestGain) -> None:
        """Append what came later; `later` is not used afterwards."""
        known = {delta.index: delta for delta in self.deltas}
        for delta in later.deltas:
            earlier = known.get(delta.index)
            if earlier is None:
                self.deltas.append(delta)
                continue
            earlier.text += delta.text
            earlier.token_ids += delta.token_ids
            if delta.logprobs is not None:
                earlier.logprobs = (earlier.logprobs or []) + delta.logprobs
            earlier.finish_reason, earlier.stop_reason = delta.finish_reason, delta.stop_reason
        self.num_cached_tokens = later.num_cached_tokens
        self.prompt_logprobs = self.prompt_logprobs or later.prompt_logprobs
        self.metrics, self.finished, self.error = later.metrics, later.finished, later.error


class OutputQueue:
    """Between the engine's loop and one reader: never longer than one gain, as later ones are merged into it."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._lock = threading.Lock()
        self._gain: RequestGain | None = None

    def put(self, gain: RequestGain) -> bool:
        """Hand over a gain, without waiting. True where nothing lay there: the reader has to be told."""
        with self._lock:
            if self._gain is not None:
                self._gain.merge(gain)
                return False
            self._gain = gain
            return True

    def take(self) -> RequestGain | None:
        """All that came since the last call, without waiting; None where nothing did."""
        with self._lock:
            gain, self._gain = self._gain, None
            return gain
