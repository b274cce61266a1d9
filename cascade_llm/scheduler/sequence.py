"""A request, the token streams that it becomes, and what a step does to one."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterator
from collections.abc import Sequence as TokenSequence
from dataclasses import dataclass, field
from enum import Enum

from cascade_llm.errors import GenerationError
from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import IntColumn
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.page_keys import PageKeys
from cascade_llm.scheduler.prefix_cache import RadixNode
from cascade_llm.scheduler.sessions import SessionName, SessionUse

__all__ = ["Client", "Request", "Sequence", "SequenceSharing", "SequenceStatus", "SequenceUpdate", "TokenMask"]

TokenMask = Callable[[TokenSequence[int]], IntColumn]
"""What may come after a sample's output token ids: a row of `StepPlan.token_bitmasks`; a pure function."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """Who asks: requests of one client take turns with those of another, and share pages within a tenant alone."""

    name: str = ""
    """Whose turn it is."""
    tenant: str = ""
    """Whose prefixes and sessions it meets; clients of one tenant trust each other."""
    weight: float = 1.0
    """Above 0; a client of weight 2 is served twice as many tokens as one of weight 1 while both wait."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asked: one prompt, `params.n` samples. Checked before it gets here."""

    request_id: str
    prompt_token_ids: TokenSequence[int]
    params: SamplingParams
    seed: int
    """The seed of its draws: the user's, or one that the engine drew."""
    priority: int = 0
    """Lower runs earlier; equal priorities in order of arrival."""
    model_ending_token_ids: frozenset[int] = frozenset()
    """The model's own end-of-sequence ids."""
    client: Client = Client()
    cache_salt: bytes = b""
    """Requests of another salt never share pages with this one, nor do those of another tenant."""
    mask: TokenMask | None = None
    """Which tokens its samples may draw; called on the host when the tokens before are known."""
    session: SessionUse | None = None
    """The session of which it is a turn; of several samples the first one's pages are kept."""
    first_mask: IntColumn | None = field(init=False)
    """Of the first tokens."""
    ending_token_ids: frozenset[int] = field(init=False)
    """All ids that end it: the model's own unless `ignore_eos`, and `stop_token_ids`."""

    def __post_init__(self) -> None:
        own = frozenset() if self.params.ignore_eos else self.model_ending_token_ids
        object.__setattr__(self, "ending_token_ids", own | frozenset(self.params.stop_token_ids or ()))
        object.__setattr__(self, "first_mask", self.mask(()) if self.mask is not None else None)


@dataclass(frozen=True, slots=True)
class SequenceSharing:
    """What the steps of a sequence read of the KV cache, and shared, added up when they are planned."""

    num_steps: int = 0
    """Steps that it had rows in."""
    num_shared_steps: int = 0
    """Those of them that read a part of it together with others."""
    num_levels: int = 1
    """The most levels that a step read it on, the leaf counted."""
    group_size: int = 1
    """The most sequences that a segment was read for, itself counted."""
    kv_tokens_read: float = 0.0
    """Tokens of K/V; of a segment that g sequences read together, a g-th each."""
    kv_tokens_saved: float = 0.0
    """Tokens of K/V that it would have read besides, alone."""


class SequenceStatus(Enum):
    """Where a sequence is in its life: WAITING → RUNNING (→ WAITING when preempted) → FINISHED."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One token stream: the prompt, then what was generated.

    Its K/V lie in `pages`, in order: first those of the prefix cache on the path to `tail`, then its own. `planned_len`
    tokens have their K/V computed or planned to be, `committed_len` by steps whose results are known. A token that is
    sampled by a step in flight is *unresolved*: it has a place but no known id.
    """

    __slots__ = (
        "arrival",
        "charged_len",
        "committed_len",
        "computed_len",
        "epoch",
        "finish_reason",
        "forked",
        "held_from",
        "keys",
        "lane",
        "mask",
        "max_len",
        "num_cached_tokens",
        "num_prompt_logprobs",
        "num_unresolved",
        "pages",
        "planned_len",
        "prompt_len",
        "request",
        "sample_index",
        "session",
        "sharing",
        "status",
        "tail",
        "token_ids",
        "window_starts",
    )

    def __init__(
        self,
        request: Request,
        sample_index: int,
        arrival: int,
        page_size: int,
        root_key: bytes,
        max_model_len: int | None = None,
    ) -> None:
        self.request = request
        self.sample_index = sample_index
        self.arrival = arrival
        self.token_ids = array("i", request.prompt_token_ids)
        self.prompt_len = len(self.token_ids)
        most = min(self.prompt_len + request.params.max_tokens, max_model_len or sys.maxsize)
        self.max_len = max(most, self.prompt_len + 1)
        """It ends when it has so many tokens. Where only its prompt is scored, the one token that is drawn has no
        place in the pool and is shown to nobody."""
        self.keys = PageKeys(root_key, self.token_ids, page_size, request.client.tenant)
        self.status = SequenceStatus.WAITING
        self.pages = array("i")
        self.tail: RadixNode | None = None
        self.held_from = 0
        """Pages before were given up, as windows have left them behind: their entries in `pages` mean nothing."""
        self.window_starts: list[int] = []
        """In the pool of each kind with a window: it holds its pages from this one on; see `WindowPool`."""
        self.num_cached_tokens = 0
        """Prompt tokens found in the prefix cache when it was first admitted."""
        self.lane = 0
        self.epoch = 0
        self.planned_len = 0
        self.committed_len = 0
        self.computed_len = 0
        """The `planned_len` that it had when it was preempted: rows below are computed again."""
        self.charged_len = self.prompt_len
        """Tokens that its client was charged for; see `Turns`."""
        self.num_unresolved = 0
        self.mask = request.first_mask
        """What its next token may be."""
        self.num_prompt_logprobs = max(0, request.params.prompt_logprobs_start - 1)
        """Prompt tokens after the first whose log-probabilities were reported, or not asked for."""
        self.forked = request.params.n == 1 or sample_index > 0
        """Whether the other samples of the request exist already."""
        self.finish_reason: str | None = None
        self.sharing = SequenceSharing()
        """See `SharingLedger`."""
        self.session = request.session if sample_index == 0 else None
        """What keeps its pages when it ends."""

    @property
    def precedence(self) -> tuple[int, int, int]:
        """Smaller runs earlier and is preempted later; kept for life, so the oldest always advances."""
        return (self.request.priority, self.arrival, self.sample_index)

    @property
    def session_name(self) -> SessionName | None:
        """Of `session`."""
        return None if self.session is None else SessionName(self.request.client.tenant, self.session.session_id)

    @property
    def total_len(self) -> int:
        """Tokens that have a place, the unresolved ones counted."""
        return len(self.token_ids) + self.num_unresolved

    @property
    def can_draft(self) -> bool:
        """Whether it decodes, knows all its tokens, and may draw any, whichever came before: then proposed tokens can
        be checked together. A penalty would have to count each of them before the next is drawn."""
        is_last = self.planned_len == len(self.token_ids) - 1 >= self.prompt_len
        is_free = self.request.mask is None and not self.request.params.has_penalties
        return is_last and is_free and not self.num_unresolved

    @property
    def only_waited(self) -> bool:
        """Whether it has nothing that a scheduler gives: neither pages nor tokens that are planned."""
        idle = self.tail is None and not self.planned_len and not self.num_unresolved
        return idle and self.status is SequenceStatus.WAITING

    @property
    def reports_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt come with this sequence's rows."""
        return self.sample_index == 0 and self.request.params.prompt_logprobs is not None

    def resolve_token(self, token_id: int) -> str | None:
        """The id of its oldest unresolved token is known; returns why that ends it ("stop", "length"), or None."""
        self.num_unresolved -= 1
        self.token_ids.append(token_id)
        num_tokens, request = len(self.token_ids), self.request
        if token_id in request.ending_token_ids and num_tokens - self.prompt_len > request.params.min_tokens:
            return "stop"
        return "length" if num_tokens >= self.max_len else None

    def advance_mask(self) -> GenerationError | None:
        """Ask the request's mask for the next token; returns what became of it where it raises."""
        assert self.request.mask is not None
        output = self.token_ids[self.prompt_len :]
        try:
            self.mask = self.request.mask(output)
        except Exception as error:
            failure = GenerationError(
                f"the mask of {self.request.request_id}, sample {self.sample_index}, raised {type(error).__name__} "
                f"after {len(output)} tokens: {error}; it must return a bitmask for every output that it allowed"
            )
            failure.__cause__ = error
            return failure
        return None

    def take_prompt_logprobs(
        self, start_len: int, num_new: int, prompt_logprobs: Iterator[TokenLogprob]
    ) -> list[TokenLogprob]:
        """The part of a result's prompt log-probabilities that belongs to `num_new` rows from `start_len` on."""
        if not self.reports_prompt:
            return []
        first, last = max(start_len, self.num_prompt_logprobs), min(start_len + num_new, self.prompt_len - 1)
        reported = [next(prompt_logprobs) for _ in range(first, last)]
        self.num_prompt_logprobs += len(reported)
        return reported

    def update(
        self, *, finish_reason: str | None = None, prompt_logprobs: list[TokenLogprob] | None = None
    ) -> SequenceUpdate:
        """News of it without a token."""
        return SequenceUpdate(
            self.request.request_id,
            self.sample_index,
            self.num_cached_tokens,
            finish_reason=finish_reason,
            prompt_logprobs=prompt_logprobs,
        )

    def __repr__(self) -> str:
        return f"Sequence({self.request.request_id!r}, {self.sample_index}, {self.status.value})"


@dataclass(slots=True)
class SequenceUpdate:
    """What a commit did to one sequence: a new token, prompt log-probabilities, an end."""

    request_id: str
    sample_index: int
    num_cached_tokens: int
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
    """"stop", "length" or "error"."""
    stop_token_id: int | None = None
    """The `stop_token_ids` entry that ended it; None for the model's own ending ids."""
    prompt_logprobs: list[TokenLogprob] | None = None
    failure: GenerationError | None = None
    """What was raised, where that ended it."""
    sharing: SequenceSharing | None = None
    """What it shared, where it has ended by itself."""
