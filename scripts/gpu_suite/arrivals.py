"""Requests that come and go by a script: families that share prefixes, newcomers, and some that leave early.

Everything is counted in calls of the engine, so that two runs plan the very same steps, whatever their speed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cascade_llm.engine.engine import Engine
from cascade_llm.engine.requests import RequestState
from cascade_llm.outputs import CompletionOutput
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sequence import Request
from scripts.gpu_suite.sizes import PAGE_SIZE, Sizes

__all__ = ["Arrival", "drive", "longest_sequence", "scripted"]

NEXT_FAMILY = 7
"""Calls after which the next family comes."""
OWN_TOKENS = 20
ALONE_TOKENS = 120
"""Of a prompt that shares nothing: it grows past 128 tokens of its own, where kernels begin to split K/V."""


@dataclass(frozen=True)
class Arrival:
    """One request."""

    call: int
    """The call before which it comes."""
    request_id: str
    prompt: tuple[int, ...]
    num_tokens: int
    """That it generates."""
    leaves: int | None
    """The call before which it is given up."""


def scripted(sizes: Sizes, vocab_size: int, seed: int = 0) -> list[Arrival]:
    """Families one after another below one common prefix, single requests between them, and one in seven that leaves.

    At the end of each family its level has ever fewer rows and then none; at the end of the last nothing is shared.
    """
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocab_size) for _ in range(count))

    common, arrivals = tokens(sizes.prefix_pages * PAGE_SIZE), []
    for family in range(sizes.families):
        prefix = (common if family % 4 < 3 else ()) + tokens(sizes.prefix_pages * PAGE_SIZE + family)
        for member in range(sizes.per_family):
            call = NEXT_FAMILY * family + member % 3
            is_alone, leaves = member % 6 == 5, call + 6 if member % 7 == 3 else None
            prompt = tokens(ALONE_TOKENS) if is_alone else prefix + tokens(1 + rng.randrange(OWN_TOKENS))
            num_tokens = rng.randrange(sizes.longest // 4, sizes.longest)
            arrivals.append(Arrival(call, f"{family}-{member}", prompt, num_tokens, leaves))
    return sorted(arrivals, key=lambda arrival: arrival.call)


def longest_sequence(arrivals: Sequence[Arrival]) -> int:
    """Tokens of the longest, prompt and output."""
    return max(len(arrival.prompt) + arrival.num_tokens for arrival in arrivals)


def drive(engine: Engine, arrivals: Sequence[Arrival], params: SamplingParams) -> dict[str, CompletionOutput]:
    """Run the script to its end; every request has these parameters, a seed and a length of its own."""
    states: dict[str, RequestState] = {}
    call, coming = 0, list(arrivals)
    while coming or engine.has_unfinished:
        while coming and coming[0].call <= call:
            arrival = coming.pop(0)
            states[arrival.request_id] = engine.add(_request(arrival, params))
        for arrival in arrivals:
            if arrival.leaves == call:
                engine.abort(arrival.request_id)
        engine.step()
        call += 1
    for state in states.values():
        if state.output.error is not None:
            raise state.output.error
    return {name: state.output.outputs[0] for name, state in states.items()}


def _request(arrival: Arrival, params: SamplingParams) -> Request:
    own = replace(params, max_tokens=arrival.num_tokens, ignore_eos=True)
    seed = sum(arrival.prompt) * 1_000_003 + arrival.call
    return Request(request_id=arrival.request_id, prompt_token_ids=arrival.prompt, params=own, seed=seed)
