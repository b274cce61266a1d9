from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models

from cascade_llm.engine.text import DetokenizedDelta, IncrementalDetokenizer, TextDecoder
from cascade_llm.engine.tokenizer import Tokenizer, load_tokenizer
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.sampling_params import SamplingParams

IM_START, IM_END = 1, 2

TEXTS = [
    "Hello, world! It's 12345.",
    "naïve Ångström e\u0301 o\u0323\u0304",
    "你好世界。 日本語のテキスト 한국어",
    "👍🏽🇺🇸👩‍👩‍👧‍👦 ok 🫠",
    "  two  and   three \n\n\tx ",
    "مرحبا שלום",
    "replaced \ufffd here",
]


@functools.cache
def smollm2() -> Tokenizer:
    tokenizer = load_tokenizer(open_checkpoint("smollm2").tokenizer_source)
    assert tokenizer is not None
    return tokenizer


class SentencePieceLike:
    """Decodes as Llama 2's tokenizer does: bytes where the vocabulary has no piece, one leading space dropped."""

    def __init__(self) -> None:
        pieces = [
            "<unk>",
            "▁",
            "▁Hello",
            "▁world",
            "wor",
            "ld",
            "!",
            "▁a",
            "é",
            *(f"<0x{byte:02X}>" for byte in range(256)),
        ]
        self.vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
        self._backend = BackendTokenizer(models.BPE(vocab=self.vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
        self._backend.add_special_tokens(["<s>", "</s>"])
        self._backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self.special = self._backend.token_to_id("</s>")

    def ids(self, *pieces: str) -> list[int]:
        """Ids of pieces; of other text, its bytes."""
        found: list[int] = []
        for piece in pieces:
            known = piece in self.vocab
            found += [self.vocab[piece]] if known else [self.vocab[f"<0x{byte:02X}>"] for byte in piece.encode()]
        return found

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


def stream(
    tokenizer: TextDecoder, token_ids: Sequence[int], prompt: Sequence[int] = (), **params: object
) -> list[DetokenizedDelta]:
    """Deltas of one token at a time, up to the end or a stop string."""
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(**params), prompt)  # type: ignore[arg-type]
    deltas: list[DetokenizedDelta] = []
    for index, token_id in enumerate(token_ids):
        deltas.append(detokenizer.push([token_id], finished=index == len(token_ids) - 1))
        if deltas[-1].stopped_by is not None:
            break
    return deltas


def text_of(deltas: list[DetokenizedDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("text", TEXTS)
def test_deltas_make_up_the_text(text: str) -> None:
    tokenizer = smollm2()
    token_ids = tokenizer.encode(text)
    deltas = stream(tokenizer, token_ids)
    assert text_of(deltas) == tokenizer.decode(token_ids) == text
    assert text.count("\ufffd") == text_of(deltas).count("\ufffd")


def test_text_appears_with_the_token_that_completes_it() -> None:
    tokenizer = smollm2()
    token_ids = tokenizer.encode("one two 🫠 three")
    shown = ""
    for index, delta in enumerate(stream(tokenizer, token_ids)):
        shown += delta.text
        assert shown == tokenizer.decode(token_ids[: index + 1]).rstrip("\ufffd")


TOKENS = st.integers(0, 49151)


@given(st.lists(TOKENS, max_size=60), st.booleans())
def test_any_ids_give_the_text_of_one_decode(token_ids: list[int], skip: bool) -> None:
    tokenizer = smollm2()
    deltas = stream(tokenizer, token_ids, skip_special_tokens=skip)
    assert text_of(deltas) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@functools.cache
def byte_ids() -> list[int]:
    """The single-byte tokens of SmolLM2 that are no ASCII characters."""
    tokenizer = smollm2()
    return [
        i
        for i in range(49152)
        if tokenizer.decode([i]) == "\ufffd" and len(tokenizer.backend.id_to_token(i) or "") == 1
    ]


@given(st.data())
def test_any_bytes_give_the_text_of_one_decode(data: st.DataObject) -> None:
    tokenizer = smollm2()
    some = st.sampled_from([*byte_ids()[:: len(byte_ids()) // 40], *tokenizer.encode("🫠中é"), IM_END])
    token_ids = data.draw(st.lists(some, max_size=80))
    assert text_of(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_unfinished_character_at_the_end() -> None:
    tokenizer = smollm2()
    token_ids = tokenizer.encode("ok 🫠")
    deltas = stream(tokenizer, token_ids[:-1])
    assert text_of(deltas) == tokenizer.decode(token_ids[:-1])
    assert text_of(deltas).endswith("\ufffd")
    assert "\ufffd" not in text_of(deltas[:-1])


class CountingDecoder:
    """Notes the longest run of ids that it was asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self.longest = tokenizer, 0

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        self.longest = max(self.longest, len(token_ids))
        return self._tokenizer.decode(token_ids, skip_special_tokens)


@pytest.mark.parametrize("kind", ["words", "garbage", "skipped special tokens", "unknown ids"])
def test_cost_of_a_token_does_not_grow(kind: str) -> None:
    tokenizer = smollm2()
    one = {"words": 28, "garbage": byte_ids()[0], "skipped special tokens": IM_END, "unknown ids": 10**6}[kind]
    token_ids = [*tokenizer.encode("Start"), *[one] * 500, *tokenizer.encode(" end")]
    counting = CountingDecoder(tokenizer)
    assert text_of(stream(counting, token_ids)) == tokenizer.decode(token_ids)
    assert counting.longest <= 40


def test_output_continues_the_prompt() -> None:
    tokenizer = SentencePieceLike()
    prompt, output = tokenizer.ids("▁Hello"), tokenizer.ids("▁world", "!", "▁", "中", "▁a")
    assert text_of(stream(tokenizer, output, prompt)) == " world! 中 a"
    assert text_of(stream(tokenizer, output)) == tokenizer.decode(output) == "world! 中 a"


def test_leading_space_is_kept_after_special_tokens() -> None:
    tokenizer = SentencePieceLike()
    prompt = [*tokenizer.ids("▁Hello"), *[tokenizer.special] * 20]
    output = [tokenizer.special, *tokenizer.ids("▁world"), tokenizer.special, *tokenizer.ids("▁a")]
    assert text_of(stream(tokenizer, output, prompt)) == " world a"


def test_a_character_begun_by_the_prompt_is_shown_whole() -> None:
    tokenizer = smollm2()
    token_ids = tokenizer.encode("ok 🫠")
    assert text_of(stream(tokenizer, token_ids[-1:], prompt=token_ids[:-1])) == "🫠"


PIECES = st.sampled_from(["▁", "▁Hello", "▁world", "wor", "ld", "!", "▁a", "é", "中", "🫠", "\n"])


@given(st.lists(PIECES, max_size=40))
@example(["▁"] * 30)
@example(["中"] * 20)
def test_sentencepiece_gives_the_text_of_one_decode(pieces: list[str]) -> None:
    tokenizer = SentencePieceLike()
    token_ids = tokenizer.ids(*pieces)
    assert text_of(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)


def test_several_tokens_at_once_are_as_one_by_one() -> None:
    tokenizer = smollm2()
    token_ids = tokenizer.encode("one 🫠 two\n\nthree")
    params = SamplingParams(stop=["two\n"])
    delta = IncrementalDetokenizer(tokenizer, params, ()).push(token_ids)
    single = stream(tokenizer, token_ids, stop=["two\n"])
    assert delta == DetokenizedDelta("one 🫠 ", "two\n", len(single))
    assert text_of(single) == delta.text
    assert len(single) < len(token_ids)


def test_stop_string_across_tokens() -> None:
    tokenizer = smollm2()
    token_ids = tokenizer.encode("The answer is 42. Therefore we stop here.")
    for include, expected in ((False, "The answer is 42"), (True, "The answer is 42. There")):
        deltas = stream(tokenizer, token_ids, stop=[". There"], include_stop_str_in_output=include)
        assert text_of(deltas) == expected
        assert deltas[-1].stopped_by == ". There"
        shown = ""
        for delta in deltas:
            shown += delta.text
            assert expected.startswith(shown)


def test_what_was_held_back_is_shown_at_the_end() -> None:
    tokenizer = smollm2()
    deltas = stream(tokenizer, tokenizer.encode("The answer is 42."), stop=[". There"])
    assert text_of(deltas) == "The answer is 42."
    assert deltas[-1].stopped_by is None


def test_a_stop_string_of_an_unfinished_character() -> None:
    tokenizer = smollm2()
    token_ids = tokenizer.encode("ok 🫠")[:-1]
    deltas = stream(tokenizer, token_ids, stop=["\ufffd"])
    assert (text_of(deltas), deltas[-1].stopped_by) == ("ok ", "\ufffd")


def test_stop_strings_count_from_min_tokens_on() -> None:
    tokenizer = smollm2()
    token_ids = tokenizer.encode("a b a b a b")
    assert len(token_ids) == 6
    deltas = stream(tokenizer, token_ids, stop=[" b"], min_tokens=3)
    assert text_of(deltas) == "a b a"
    assert len(deltas) == 4
    assert text_of(stream(tokenizer, token_ids, stop=[" b"], min_tokens=2)) == "a"


@pytest.mark.parametrize(
    ("skip", "include", "expected"), [(False, False, "hi"), (False, True, "hi<|im_end|>"), (True, True, "hi")]
)
def test_an_ending_token_is_kept_and_not_shown(skip: bool, include: bool, expected: str) -> None:
    tokenizer = smollm2()
    params = SamplingParams(skip_special_tokens=skip, include_stop_str_in_output=include)
    delta = IncrementalDetokenizer(tokenizer, params, ()).push([6004, IM_END], finished=True, ended_by_token=True)
    assert delta == DetokenizedDelta(expected, None, 2)


def test_a_stop_token_with_text_is_not_shown() -> None:
    tokenizer = smollm2()
    token_ids = tokenizer.encode("one two three")
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(stop=["two thr"]), ())
    assert detokenizer.push(token_ids[:2]).text == "one "
    assert detokenizer.push(token_ids[2:3], finished=True, ended_by_token=True) == DetokenizedDelta("two", None, 1)


def test_an_abort_shows_what_was_held_back() -> None:
    tokenizer = smollm2()
    detokenizer = IncrementalDetokenizer(tokenizer, SamplingParams(stop=["two three"]), ())
    assert detokenizer.push(tokenizer.encode("one two")).text == "one "
    assert detokenizer.push([], finished=True) == DetokenizedDelta("two", None, 0)
