"""Texts far too long for the context: refused from their beginning, and no other text is."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade_llm.engine.input_processor import InputProcessor
from cascade_llm.engine.tokenizer import Tokenizer
from cascade_llm.errors import PromptError
from cascade_llm.sampling_params import SamplingParams
from tests.engine.test_tokenizer import TOKENIZER


class CountingTokenizer(Tokenizer):
    """Says how many characters it has tokenized."""

    num_characters = 0

    def encode(self, text: str, add_special_tokens: bool = True, split_special_tokens: bool = False) -> list[int]:
        """As ever."""
        self.num_characters += len(text)
        return super().encode(text, add_special_tokens, split_special_tokens)


def processor(tokenizer: Tokenizer, max_model_len: int) -> InputProcessor:
    return InputProcessor(
        tokenizer, vocab_size=49152, max_model_len=max_model_len, ending_token_ids=frozenset(), seed=0
    )


@given(
    parts=st.lists(st.sampled_from([*"ab \n.\t", "hello ", "the", " " * 32, "\U0001f600", "<|im_end|>"]), max_size=60),
    repeats=st.integers(1, 6),
)
def test_a_prompt_is_refused_where_it_has_too_many_tokens(parts: list[str], repeats: int) -> None:
    prompt = "a" + "".join(parts) * repeats
    fits = len(TOKENIZER.encode(prompt)) < 8
    reader = processor(TOKENIZER, 8)
    with nullcontext() if fits else pytest.raises(PromptError, match="max_model_len"):
        reader.read_prompt(prompt, SamplingParams())


@pytest.mark.parametrize("unit", ["hello world ", "a", "\U0001f600", "<|im_end|>"])
def test_little_of_a_very_long_text_is_tokenized(unit: str) -> None:
    tokenizer = CountingTokenizer(TOKENIZER.backend, TOKENIZER.special_tokens, TOKENIZER.chat_template)
    text = unit * (1_000_000 // len(unit))
    reader = processor(tokenizer, 64)
    with pytest.raises(PromptError, match="characters, more than the context of max_model_len 64 tokens holds"):
        reader.read_prompt(text, SamplingParams())
    with pytest.raises(PromptError, match="characters, more than the context"):
        reader.read_chat(
            [{"role": "user", "content": text}],
            {"add_generation_prompt": True},
            SamplingParams(split_special_tokens=True),
        )
    assert tokenizer.num_characters < 20_000
