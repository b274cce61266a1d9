"""From what a user hands over to a request that cannot fail for a reason known beforehand."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from cascade_llm.engine.tokenizer import Tokenizer
from cascade_llm.errors import PromptError, SamplingParamsError
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sequence import Request
from cascade_llm.scheduler.sessions import SessionUse

__all__ = ["InputProcessor", "Prompt"]

advice = logging.getLogger("cascade_llm.advice")
"""On requests; its lines repeat parts of them, so a server keeps it silent."""

Prompt = str | Sequence[int]
"""A text, or token ids."""

PLAIN_CHARACTERS = 16
"""For each token of the context: a longer text is looked at from its beginning before all of it is tokenized."""


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt as the scheduler takes it, and its text where it has one."""

    text: str | None
    token_ids: list[int]


class InputProcessor:
    """Tokenizes and checks requests; numbers them and gives them their seeds."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        ending_token_ids: frozenset[int],
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._ending_token_ids = ending_token_ids
        self._seeds = random.Random(seed)
        self._num_requests = 0

    def read_prompt(self, prompt: Prompt, params: SamplingParams) -> ReadPrompt:
        """Token ids of a prompt. Raises `PromptError` for one that cannot be served, with the cure."""
        if isinstance(prompt, str):
            tokenizer = self._require_tokenizer("a text prompt")
            self._refuse_far_too_long(prompt, tokenizer)
            ids = tokenizer.encode(prompt, split_special_tokens=params.split_special_tokens)
            return self._checked(prompt, ids, params)
        if isinstance(prompt, bytes | bytearray | memoryview) or not isinstance(prompt, Sequence):
            raise PromptError(f"a prompt is a text or a list of token ids, not a {type(prompt).__name__}")
        return self._checked(None, list(cast(Sequence[int], prompt)), params)

    def read_chat(
        self, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], params: SamplingParams
    ) -> ReadPrompt:
        """A conversation through a chat template; `arguments` are those of `Tokenizer.apply_chat_template`."""
        tokenizer = self._require_tokenizer("a conversation")
        try:
            text = tokenizer.apply_chat_template(messages, **arguments)
            self._refuse_far_too_long(text, tokenizer)
            if params.split_special_tokens:
                ids = tokenizer.encode_chat(messages, split_special_tokens=True, **arguments)
            else:
                ids = tokenizer.encode(text, add_special_tokens=False)
        except RecursionError:
            raise PromptError("the conversation or its tools are nested too deeply: flatten them") from None
        return self._checked(text, ids, params)

    def check(self, params: object, priority: object) -> None:
        """Raise `SamplingParamsError` for what is wrong, and what only the model can tell to be wrong."""
        if not isinstance(params, SamplingParams):
            raise SamplingParamsError(f"params is a {type(params).__name__}: give SamplingParams(...)")
        if not isinstance(priority, int) or isinstance(priority, bool) or not -(2**31) <= priority < 2**31:
            raise SamplingParamsError(f"priority is {priority!r:.80}: it must be an integer in [-2**31, 2**31)")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > self._vocab_size:
                raise SamplingParamsError(
                    f"{name} is {getattr(params, name)}: the model's vocabulary has {self._vocab_size} tokens"
                )
        for name, token_ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token_id in token_ids or ():
                if token_id >= self._vocab_size:
                    raise SamplingParamsError(
                        f"{name} has the token id {token_id}: the model's vocabulary is 0 to {self._vocab_size - 1}"
                    )
        if params.stop_strings and self._tokenizer is None:
            raise SamplingParamsError("stop strings need a tokenizer, and this checkpoint has none: use stop_token_ids")

    def request(
        self,
        prompt: ReadPrompt,
        params: SamplingParams,
        priority: int = 0,
        session: SessionUse | None = None,
        cache_salt: bytes = b"",
    ) -> Request:
        """A request of its own id. Without a seed of the user's it gets the next of the engine's."""
        request_id = f"request-{self._num_requests}"
        self._num_requests += 1
        drawn = self._seeds.getrandbits(63)
        params = self._with_special_stops(params)
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt.token_ids,
            params=params,
            seed=drawn if params.seed is None else params.seed,
            priority=priority,
            model_ending_token_ids=self._ending_token_ids,
            session=session,
            cache_salt=cache_salt,
        )

    def _with_special_stops(self, params: SamplingParams) -> SamplingParams:
        """Stop strings that are special tokens as stop ids: the text that is searched has none of these."""
        if self._tokenizer is None or not params.skip_special_tokens or not params.stop_strings:
            return params
        special = self._tokenizer.special_ids
        ids = [special[text] for text in params.stop_strings if text in special]
        for text in params.stop_strings:
            if text not in special and any(token in text for token in special):
                advice.warning(
                    "the stop string %r holds a special token, which is left out of the text: it may never be found, "
                    "set skip_special_tokens=False",
                    text,
                )
        return replace(params, stop_token_ids=(*(params.stop_token_ids or ()), *ids)) if ids else params

    def _checked(self, text: str | None, token_ids: list[int], params: SamplingParams) -> ReadPrompt:
        if not token_ids:
            raise PromptError("the prompt is empty: give at least one token")
        for token_id in token_ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise PromptError(f"a prompt is a text or a list of token ids, not a list with {token_id!r:.80}")
            if not 0 <= token_id < self._vocab_size:
                raise PromptError(
                    f"the prompt has the token id {token_id}: the model's vocabulary is 0 to {self._vocab_size - 1}"
                )
        if len(token_ids) + min(params.max_tokens, 1) > self._max_model_len:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens, the context is max_model_len {self._max_model_len} with at "
                "least one token to generate: shorten it, or raise max_model_len if the model allows"
            )
        if params.prompt_logprobs_start >= len(token_ids):
            raise SamplingParamsError(
                f"prompt_logprobs_start is {params.prompt_logprobs_start}: the prompt has {len(token_ids)} tokens"
            )
        return ReadPrompt(text, token_ids)

    def _refuse_far_too_long(self, text: str, tokenizer: Tokenizer) -> None:
        """Megabytes take many seconds to tokenize: where the beginning has twice the tokens that fit, it is enough.

        Twice, because a beginning may be cut into a few more tokens than the same text within the whole.
        """
        size = PLAIN_CHARACTERS * self._max_model_len
        while size < len(text):
            if len(tokenizer.encode(text[:size])) > 2 * self._max_model_len:
                raise PromptError(
                    f"the prompt has {len(text)} characters, more than the context of max_model_len "
                    f"{self._max_model_len} tokens holds: shorten it, or raise max_model_len if the model allows"
                )
            size *= 2

    def _require_tokenizer(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise PromptError(f"{what} needs a tokenizer, and this checkpoint has none: give token ids")
        return self._tokenizer
