"""A load: the requests of one measurement, as token ids, the same for every engine that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from cascade_llm.errors import ConfigError
from cascade_llm.sampling_params import SamplingParams

__all__ = ["HISTORIES", "History", "Load", "LoadRequest"]

History = Literal["real", "recorded"]
HISTORIES: tuple[History, ...] = ("real", "recorded")


@dataclass(frozen=True)
class LoadRequest:
    """One request; every sample of it is generated to its full length."""

    token_ids: Sequence[int]
    """The prompt, or what is added to a conversation; the whole prompt where histories are recorded."""
    output_len: int
    n: int = 1
    """Samples of the one prompt."""
    follows: int | None = None
    """The earlier request whose prompt and answer come first: this is the next turn of a conversation."""
    delay_s: float = 0.0
    """Between the end of that request and this one, where requests arrive by the clock."""
    recorded_answer: Sequence[int] = ()
    """An answer of `output_len` tokens that a later turn may go on from instead of the real one."""


@dataclass(frozen=True)
class Load:
    """Requests, and how their tokens are drawn."""

    name: str
    requests: tuple[LoadRequest, ...]
    temperature: float = 0.0
    top_p: float = 1.0
    history: History = "real"
    """What a later turn goes on from: the answer that the engine gave, or the one that the load brings."""

    @property
    def num_sequences(self) -> int:
        """Samples of all requests."""
        return sum(request.n for request in self.requests)

    @property
    def num_generated(self) -> int:
        """Tokens that a run generates."""
        return sum(request.n * request.output_len for request in self.requests)

    @property
    def num_prompt_tokens(self) -> int:
        """Prompt tokens of all requests, those of earlier turns counted again."""
        return sum(self.prompt_lens)

    @property
    def has_turns(self) -> bool:
        """Whether some requests go on from the answers of others."""
        return any(request.follows is not None for request in self.requests)

    def params(self, index: int, output_len: int | None = None) -> SamplingParams:
        """How a request is sampled; `output_len` takes the place of its own."""
        request = self.requests[index]
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=output_len or request.output_len,
            n=request.n,
            seed=index,
            ignore_eos=True,
        )

    def goes_on(self, request: LoadRequest) -> bool:
        """Whether the prompt of a request is known only when the one before it has ended."""
        return request.follows is not None and self.history == "real"

    def with_recorded_history(self) -> Load:
        """The same with every prompt known from the start: later turns go on from the recorded answers.

        Then all engines, also those that do not tell token ids, get the same prompts; a turn still waits for the end of
        the one before it. What is lost: the answers' own K/V, cached by real engines, are not met again.

        Raises `ConfigError` where an answer is missing.
        """
        prompts: list[list[int]] = []
        for request in self.requests:
            before: list[int] = []
            if request.follows is not None:
                earlier = self.requests[request.follows]
                if len(earlier.recorded_answer) != earlier.output_len:
                    raise ConfigError(f"the workload {self.name} has no recorded answers: leave out the history option")
                before = [*prompts[request.follows], *earlier.recorded_answer]
            prompts.append([*before, *request.token_ids])
        requests = (replace(request, token_ids=ids) for request, ids in zip(self.requests, prompts, strict=True))
        return replace(self, requests=tuple(requests), history="recorded")

    def as_dicts(self) -> list[dict[str, Any]]:
        """The requests as the drivers of other engines and `ArrivalQueue` take them."""
        return [
            {
                "token_ids": list(request.token_ids),
                "output_len": request.output_len,
                "n": request.n,
                "follows": request.follows,
                "delay_s": request.delay_s,
                "goes_on": self.goes_on(request),
            }
            for request in self.requests
        ]

    @cached_property
    def prompt_lens(self) -> tuple[int, ...]:
        """Prompt tokens of each request, those of earlier turns included."""
        lens: list[int] = []
        for request in self.requests:
            before = 0
            if request.follows is not None and self.history == "real":
                before = lens[request.follows] + self.requests[request.follows].output_len
            lens.append(before + len(request.token_ids))
        return tuple(lens)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence in the end."""
        return max(length + request.output_len for length, request in zip(self.prompt_lens, self.requests, strict=True))

    def check(self, context_len: int) -> None:
        """Raise `ConfigError` where there is nothing to run, or a sequence exceeds the context."""
        if not self.requests:
            raise ConfigError(f"the workload {self.name} has no requests: ask for 1 or more")
        if min(self.prompt_lens) < 1 or min(request.output_len for request in self.requests) < 1:
            raise ConfigError(f"the workload {self.name} has an empty prompt or output: give each 1 token or more")
        if self.longest > context_len:
            raise ConfigError(
                f"the workload {self.name} has a sequence of {self.longest:,} tokens, prompt and output together; the "
                f"context holds {context_len:,}: make its prompts or outputs shorter"
            )

    def pool_pages(self, page_size: int) -> int:
        """Pages that hold all of it at once, shared prefixes counted once.

        Outputs count twice: a second run may generate other tokens while the first run's pages are cached.
        """
        shared = {
            key
            for request in self.requests
            if not self.goes_on(request)
            for key in _page_keys(request.token_ids, page_size)
        }
        own = 0
        for request, prompt_len in zip(self.requests, self.prompt_lens, strict=True):
            before = prompt_len - len(request.token_ids)
            if not self.goes_on(request):
                before = prompt_len // page_size * page_size
            pages = -(-(prompt_len - before + request.output_len) // page_size) + 1
            own += 2 * pages * request.n
        return len(shared) + own

    def as_dict(self) -> dict[str, Any]:
        """Its sizes, for JSON."""
        return {
            "name": self.name,
            "num_requests": len(self.requests),
            "num_sequences": self.num_sequences,
            "num_prompt_tokens": self.num_prompt_tokens,
            "num_generated": self.num_generated,
            "longest": self.longest,
            "temperature": self.temperature,
            "top_p": self.top_p,
            **({"history": self.history} if self.has_turns else {}),
        }


def _page_keys(token_ids: Sequence[int], page_size: int) -> list[int]:
    """One number per full page, equal where all tokens up to its end are equal."""
    keys, key = [], 0
    for end in range(page_size, len(token_ids) + 1, page_size):
        key = hash((key, *token_ids[end - page_size : end]))
        keys.append(key)
    return keys
