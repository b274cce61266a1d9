"""What a user may ask of the sampling of one request, with the bounds that a step can carry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from cascade_llm.errors import SamplingParamsError, nearest_name_hint

__all__ = ["SamplingParams"]

MOST_SAMPLES = 65_536
MOST_STOPS, LONGEST_STOP = 256, 4096
LARGEST_BIAS = 1e30
MOST_SHOWN = 80
"""Characters of a wrong value that its message repeats."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when it ends.

    The steps apply in this order, each on the renormalized outcome of the one before: repetition, presence and
    frequency penalty, `logit_bias`, the `min_tokens` mask, temperature, top_k, top_p, min_p. Log-probabilities that
    are returned are the raw model's, before all of these. A draw is the inverse CDF at one uniform number that is a
    pure function of (seed, sample index, position), so it does not depend on what else is in the batch.

    Raises `SamplingParamsError` for an unknown name or a value out of range.
    """

    temperature: float = 1.0
    """0 is greedy: the first token of the largest logit."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 (or -1) keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose mass reaches p, in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less probable than min_p times the most probable, in [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of each token that was generated already, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted once per earlier generation of the token, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive logits (multiplies negative) of tokens in prompt or output; > 0."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids."""
    seed: int | None = None
    """Makes the request's draws reproducible; None (or -1) takes one from the engine's own seed."""
    n: int = 1
    """Independent samples of the one prompt; they share its pages."""
    max_tokens: int = 256
    """Generated tokens at most; 0, with prompt_logprobs, scores the prompt alone, which may then fill the context."""
    min_tokens: int = 0
    """Ending tokens are masked until this many tokens were generated."""
    stop: str | Sequence[str] | None = None
    """Strings that end the text; kept in it only with `include_stop_str_in_output`. One that is a special token ends
    it at that token, also where special tokens are left out of the text."""
    stop_token_ids: Sequence[int] | None = None
    """Token ids that end the output."""
    ignore_eos: bool = False
    """Go on after the model's own ending tokens."""
    logprobs: int | None = None
    """Report the chosen token's log-probability and this many most probable ones."""
    prompt_logprobs: int | None = None
    """The same for each prompt token after the first; nothing that is scored comes from the prefix cache."""
    prompt_logprobs_start: int = 0
    """Score the prompt from this token on only, so that what stands before may come from the prefix cache."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    include_stop_str_in_output: bool = False
    """Keep the stop string that ended the text."""
    split_special_tokens: bool = False
    """Read special tokens that are spelled out in the prompt, or in a chat's messages, as plain text."""

    def __new__(cls, *args: Any, **kwargs: Any) -> SamplingParams:
        """Refuse unknown names, naming the nearest known one."""
        if args:
            raise SamplingParamsError("SamplingParams takes keywords only, e.g. SamplingParams(temperature=0.8)")
        known = {field.name for field in fields(cls)}
        for name in kwargs:
            if name not in known:
                raise SamplingParamsError(f"unknown sampling parameter {name!r}: {nearest_name_hint(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else self._tuple("stop"))
        object.__setattr__(self, "stop_token_ids", self._tuple("stop_token_ids"))
        if not isinstance(self.logit_bias, Mapping | None):
            raise SamplingParamsError(f"logit_bias is {_shown(self.logit_bias)}: it must map token ids to numbers")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias or {}))
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.seed == -1:
            object.__setattr__(self, "seed", None)
        self._check()

    @property
    def greedy(self) -> bool:
        """Whether the token is the largest logit, without a draw."""
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        """Whether what was used before changes any logit."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(self.stop or ())

    def _check(self) -> None:
        self._number("temperature", "0 or larger (0 is greedy), at most 1e30", lambda x: 0 <= x <= 1e30)
        self._integer("top_k", "0 (all) or larger, below 2**31", lambda x: 0 <= x < 2**31)
        self._number("top_p", "in (0, 1]; 1 keeps all tokens", lambda x: 0 < x <= 1)
        self._number("min_p", "in [0, 1]; 0 keeps all tokens", lambda x: 0 <= x <= 1)
        self._number("presence_penalty", "in [-2, 2]", lambda x: -2 <= x <= 2)
        self._number("frequency_penalty", "in [-2, 2]", lambda x: -2 <= x <= 2)
        self._number("repetition_penalty", "above 0, 1e-6 to 1e6; 1 switches it off", lambda x: 1e-6 <= x <= 1e6)
        self._integer("n", f"1 or larger, at most {MOST_SAMPLES}", lambda x: 1 <= x <= MOST_SAMPLES)
        least = 0 if self.prompt_logprobs is not None else 1
        allowed = "1 or larger (0 with prompt_logprobs, to score the prompt alone), below 2**31"
        self._integer("max_tokens", allowed, lambda x: least <= x < 2**31)
        self._integer("min_tokens", "between 0 and max_tokens", lambda x: 0 <= x <= self.max_tokens)
        if self.seed is not None:
            self._integer("seed", "in [-2**63, 2**63)", lambda x: -(2**63) <= x < 2**63)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._integer(name, "None, 0 or larger, below 2**31", lambda x: 0 <= x < 2**31)
        self._integer("prompt_logprobs_start", "0 or larger, below 2**31", lambda x: 0 <= x < 2**31)
        if self.prompt_logprobs_start and self.prompt_logprobs is None:
            raise SamplingParamsError("prompt_logprobs_start does nothing without prompt_logprobs: give both")
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "split_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise SamplingParamsError(f"{name} is {_shown(getattr(self, name))}: it must be True or False")
        self._check_stops()
        for token_id, bias in (self.logit_bias or {}).items():
            if not _is_integer(token_id) or token_id < 0:
                raise SamplingParamsError(f"logit_bias has the key {_shown(token_id)}: give token ids, 0 or larger")
            if not _is_number(bias) or not abs(bias) <= LARGEST_BIAS:
                raise SamplingParamsError(
                    f"logit_bias[{_shown(token_id)}] is {_shown(bias)}: give a finite number, at most {LARGEST_BIAS}"
                )

    def _check_stops(self) -> None:
        if len(self.stop_strings) > MOST_STOPS:
            raise SamplingParamsError(f"stop has {len(self.stop_strings)} strings: give at most {MOST_STOPS}")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise SamplingParamsError(f"stop has {_shown(text)}: give non-empty strings")
            if len(text) > LONGEST_STOP:
                raise SamplingParamsError(f"stop has a string of {len(text)} characters: at most {LONGEST_STOP} can be")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise SamplingParamsError(f"stop has {_shown(text)}: half a surrogate pair stands in no text")
        for token_id in self.stop_token_ids or ():
            if not _is_integer(token_id) or token_id < 0:
                raise SamplingParamsError(f"stop_token_ids has {_shown(token_id)}: give token ids, 0 or larger")

    def _tuple(self, name: str) -> tuple[Any, ...]:
        value = getattr(self, name)
        if value is None:
            return ()
        if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
            raise SamplingParamsError(f"{name} is {_shown(value)}: it must be a list")
        return tuple(value)

    def _number(self, name: str, allowed: str, test: Any) -> None:
        value = getattr(self, name)
        if not _is_number(value) or value != value or not test(value):
            raise SamplingParamsError(f"{name} is {_shown(value)}: it must be {allowed}")

    def _integer(self, name: str, allowed: str, test: Any) -> None:
        value = getattr(self, name)
        if not _is_integer(value) or not test(value):
            raise SamplingParamsError(f"{name} is {_shown(value)}: it must be an integer, {allowed}")


def _shown(value: object) -> str:
    """A wrong value for a message: not all of a long one, and no digits of a number that Python will not write."""
    try:
        text = repr(value)
    except Exception:  # an integer of more than 4300 digits, or an object's own
        return f"an unreadable {type(value).__name__}"
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
