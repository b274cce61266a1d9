"""The events of the live view, as /openapi.json publishes them; what `SharingView` tells fits them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from cascade_llm.server.schema import Answer

__all__ = ["SHARING_EVENTS"]


class SharedRunEvent(Answer):
    """Tokens of K/V that a step reads once for several sequences; see `SharedRun`."""

    level: int
    start_len: int
    """Tokens before it that are shared too."""
    num_tokens: int
    num_sequences: int
    kv_bytes_saved: int
    """In the layers of its kind."""
    runs: list[SharedRunEvent]
    """Inside: of some of its sequences."""
    own_lens: list[int]
    """Tokens that the others of its sequences have to themselves."""
    text: str | None = None
    """How it begins; with --show-text."""


class KindEvent(Answer):
    """What the layers of one attention kind share."""

    window_len: int | None
    """Tokens that they read; null where they read all earlier ones."""
    num_layers: int
    runs: list[SharedRunEvent]
    own_lens: list[int]
    """Tokens of the sequences that share nothing."""


class StepEvent(Answer):
    """The last step; the kind that reads most is the first."""

    step_id: int
    num_sequences: int
    num_levels: int
    num_groups: int
    kv_bytes_read: int
    kv_bytes_saved: int
    reason: str | None
    """Why nothing was shared."""
    kinds: list[KindEvent]


class PoolEvent(Answer):
    """Where the pages of a KV pool are: of all attention kinds, or of one."""

    window_len: int | None
    """The widest window of its layers; null where they read all earlier tokens."""
    total_pages: int
    free_pages: int
    held_pages: int
    cached_pages: int
    session_pages: int
    """Of the held ones those that sessions hold."""


class CachedRunEvent(Answer):
    """Tokens that the prefix cache has behind others."""

    num_tokens: int
    num_holders: int
    """Running sequences and sessions; none holds what is only cached."""
    has_pages: bool
    """Whether its K/V are there; else its text stands for the way to what is behind it."""
    runs: list[CachedRunEvent]
    """Behind it: those that most hold, and that branch most."""
    num_more: int
    """Behind it, and not told."""
    text: str | None = None
    """How it begins; with --show-text."""


class CacheEvent(Answer):
    """The prefix cache from its beginning on."""

    runs: list[CachedRunEvent]
    num_more: int


class EngineEvent(Answer):
    """The engine does not answer."""

    engine: Literal["starting", "down", "ended"]


class TenantEvent(Answer):
    """What is told of a tenant's own sequences, where keys have tenants."""

    engine: Literal["ready"]
    running_sequences: int
    waiting_sequences: int
    cache: CacheEvent
    last_step: StepEvent | None


class SharingEvent(TenantEvent):
    """What is told of all sequences: counters since the engine started, and where pages are now."""

    steps: int
    cascade_steps: int
    generated_tokens: int
    cached_tokens: int
    kv_bytes_read: int
    kv_bytes_saved: int
    pools: list[PoolEvent]


SHARING_EVENTS: Sequence[type[Answer]] = (SharingEvent, TenantEvent, EngineEvent)
