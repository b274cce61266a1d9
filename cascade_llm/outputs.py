"""What a user gets back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cascade_llm.errors import CascadeError

__all__ = ["CompletionDelta", "CompletionOutput", "RequestMetrics", "RequestOutput", "TokenLogprob"]


FIRST_SAMPLE_KEYS = ("text", "token_ids", "finish_reason", "logprobs", "cumulative_logprob")


class TokenLogprob(NamedTuple):
    """The raw model's log-probabilities at one position, natural logarithm."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most probable token."""
    top: tuple[tuple[int, float], ...]
    """The most probable (token id, log-probability), best first; as many as were asked for."""


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    """"stop" (an ending token or stop string), "length", "abort", "error"; None while it runs."""
    stop_reason: int | str | None = None
    """The stop token id or string that ended it; None for the model's own ending tokens."""
    logprobs: list[TokenLogprob] | None = None
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class RequestMetrics:
    """What the steps of a request read of the KV cache, and shared with other sequences; of all samples that ended.

    Steps and bytes are added up over the samples: of a segment that g sequences read together, each has read a g-th.
    """

    num_steps: int = 0
    num_shared_steps: int = 0
    """Those of them that read a part of it together with others."""
    num_levels: int = 1
    """The most levels that a step read it on, the leaf counted."""
    group_size: int = 1
    """The most sequences that a segment was read for, itself counted."""
    kv_bytes_read: int = 0
    """K and V, over all layers."""
    kv_bytes_saved: int = 0
    """What would have been read besides, alone."""

    def add(self, other: RequestMetrics) -> None:
        """Count another sample, or request."""
        self.num_steps += other.num_steps
        self.num_shared_steps += other.num_shared_steps
        self.num_levels = max(self.num_levels, other.num_levels)
        self.group_size = max(self.group_size, other.group_size)
        self.kv_bytes_read += other.kv_bytes_read
        self.kv_bytes_saved += other.kv_bytes_saved


@dataclass(slots=True)
class CompletionDelta:
    """What one sample of a streamed request gained since the last delta."""

    index: int
    text: str
    token_ids: list[int]
    """May be empty while text is held back (half a character, the beginning of a stop string), and vice versa."""
    finish_reason: str | None = None
    logprobs: list[TokenLogprob] | None = None
    stop_reason: int | str | None = None
    """As in `CompletionOutput`, with the last delta."""


@dataclass(slots=True)
class RequestOutput:
    """A request and its samples. `out["text"]` and `out["token_ids"]` are the first sample's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    num_cached_tokens: int = 0
    """Prompt tokens whose K/V were found instead of computed (first sample, first admission)."""
    prompt_logprobs: list[TokenLogprob | None] | None = None
    """One per prompt token; the first is None."""
    metrics: RequestMetrics | None = None
    """What was read and shared for it; None until a sample has ended by itself."""
    error: CascadeError | None = None
    """Why the request could not be served, with `on_error="return"`; its outputs are what it had by then."""

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        if self.error is not None:
            return True
        return bool(self.outputs) and all(output.finish_reason is not None for output in self.outputs)

    def __getitem__(self, key: str) -> Any:
        if key in FIRST_SAMPLE_KEYS:
            if not self.outputs and self.error is not None:
                raise self.error
            return getattr(self.outputs[0], key)
        if key in self.__dataclass_fields__:
            return getattr(self, key)
        raise KeyError(key)

    def keys(self) -> tuple[str, ...]:
        """The names that `out[...]` takes."""
        return (*FIRST_SAMPLE_KEYS, *self.__dataclass_fields__)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())
