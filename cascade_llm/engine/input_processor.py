"""From what a user hands over to a request that cannot fail for a reason known beforehand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cascade_llm.engine.tokenizer import Tokenizer
from cascade_llm.errors import PromptError, SamplingParamsError
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sequence import Request

__all__ = ["InputProcessor", "Prompt"]

Prompt = str | Sequence[int]
"""A text, or token ids."""


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

    def read_prompt(self, prompt: Prompt) -> ReadPrompt:
        """Token ids of a prompt. Raises `PromptError` for one that cannot be served, with the cure."""
        if not isinstance(prompt, str):
            return self._checked(None, list(prompt))
        return self._checked(prompt, self._require_tokenizer("a text prompt").encode(prompt))

    def read_chat(self, messages: Sequence[Mapping[str, Any]]) -> ReadPrompt:
        """A conversation through the model's chat template, ending where the assistant's turn begins."""
        tokenizer = self._require_tokenizer("a conversation")
        text = tokenizer.apply_chat_template(messages)
        return self._checked(text, tokenizer.encode(text, add_special_tokens=False))

    def check_params(self, params: SamplingParams) -> None:
        """Raise `SamplingParamsError` for what only the model can tell to be wrong."""
        for name, token_ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token_id in token_ids or ():
                if token_id >= self._vocab_size:
                    raise SamplingParamsError(
                        f"{name} has the token id {token_id}: the model's vocabulary is 0 to {self._vocab_size - 1}"
                    )
        if params.stop_strings and self._tokenizer is None:
            raise SamplingParamsError("stop strings need a tokenizer, and this checkpoint has none: use stop_token_ids")

    def request(self, prompt: ReadPrompt, params: SamplingParams, priority: int = 0) -> Request:
        """A request of its own id. Without a seed of the user's it gets the next of the engine's."""
        request_id = f"request-{self._num_requests}"
        self._num_requests += 1
        drawn = self._seeds.getrandbits(63)
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt.token_ids,
            params=params,
            seed=drawn if params.seed is None else params.seed,
            priority=priority,
            model_ending_token_ids=self._ending_token_ids,
        )

    def _checked(self, text: str | None, token_ids: list[int]) -> ReadPrompt:
        if not token_ids:
            raise PromptError("the prompt is empty: give at least one token")
        for token_id in token_ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise PromptError(f"a prompt is a text or a list of token ids, not a list with {token_id!r}")
            if not 0 <= token_id < self._vocab_size:
                raise PromptError(
                    f"the prompt has the token id {token_id}: the model's vocabulary is 0 to {self._vocab_size - 1}"
                )
        if len(token_ids) >= self._max_model_len:
            raise PromptError(
                f"the prompt has {len(token_ids)} tokens, the context is max_model_len {self._max_model_len} with at "
                "least one token to generate: shorten it, or raise max_model_len if the model allows"
            )
        return ReadPrompt(text, token_ids)

    def _require_tokenizer(self, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise PromptError(f"{what} needs a tokenizer, and this checkpoint has none: give token ids")
        return self._tokenizer
