"""What comes of a step, sequence by sequence."""

from __future__ import annotations

from dataclasses import dataclass

from cascade_llm.outputs import TokenLogprob

__all__ = ["SequenceUpdate"]


@dataclass(slots=True)
class SequenceUpdate:
    """What a commit did to one sequence: a new token, prompt log-probabilities, an end."""

    request_id: str
    sample_index: int
    token_id: int | None = None
    logprob: TokenLogprob | None = None
    finish_reason: str | None = None
    """"stop", "length" or "error"."""
    stop_token_id: int | None = None
    """The `stop_token_ids` entry that ended it; None for the model's own ending ids."""
    prompt_logprobs: list[TokenLogprob] | None = None
    num_cached_tokens: int = 0
