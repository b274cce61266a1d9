from __future__ import annotations

import functools
import json
import re
import string
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer
from transformers.models.qwen2 import Qwen2Tokenizer

from cascade_llm.errors import CheckpointError, UnsupportedModelError
from cascade_llm.loader.gguf_file import GGUFFile
from cascade_llm.loader.gguf_tokenizer import build_tokenizer
from cascade_llm.loader.resolve import open_checkpoint
from tests.loader.gguf_files import write_gguf

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  and   three ",
    "line\nline\r\n\n\n  indented\ttab",
    "I'm sure THEY'LL say it's fine; we've seen it",
    "12345 and 3.14159, 1,000,000   7",
    "naïve Ångström e\u0301 你好世界。 مرحبا 👍🏽🇺🇸",
    "def f(x):\n    return x ** 2  # why/what",
    "<s>in</s> <|end|>the<|end|> text",
]

MODEL_KEYS: dict[str, Any] = {
    "context_length": 64,
    "embedding_length": 8,
    "block_count": 1,
    "feed_forward_length": 8,
    "attention.head_count": 1,
    "attention.head_count_kv": 1,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 1e4,
}


def tokenizer_file(
    folder: Path, architecture: str, keys: Mapping[str, Any], other_keys: Mapping[str, Any] | None = None
) -> Path:
    """`keys` are those of tokenizer.ggml, `other_keys` whole names."""
    tensors = {"token_embd.weight": np.zeros((8, 8), np.float32)}
    names = {f"tokenizer.ggml.{name}": value for name, value in keys.items()} | dict(other_keys or {})
    return write_gguf(folder / "tiny.gguf", architecture, MODEL_KEYS, tensors, other_keys=names)


def byte_level_keys(pre: str | None) -> dict[str, Any]:
    """A small vocabulary, trained on the texts with the split of GPT-2, and four added tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    added = ["<s>", "</s>", "<|end|>", "<think>"]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, *added],
        "token_type": [*[1] * len(tokens), 3, 3, 3, 4],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
    }


def transformers_tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("pre", [None, "gpt-2", "olmo", "llama-bpe", "smaug-bpe", "dbrx", "tekken"])
def test_byte_level_equals_transformers_conversion(tmp_path: Path, pre: str | None) -> None:
    path = tokenizer_file(tmp_path, "llama", byte_level_keys(pre))
    ours, theirs = build_tokenizer(GGUFFile(path)), transformers_tokenizer(path)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text, add_special_tokens=False), text
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-4o", ["Hello", "World's", " ", "123", "45", " it'S", " a", "/b", ".\n/\n\n", " ÉCOLE"]),
        ("dbrx", ["HelloWorld", "'s", " ", "123", "45", " it", "'S", " a", "/b", ".\n", "/\n\n", " ÉCOLE"]),
        ("glm4", ["HelloWorld", "'s", " ", "123", "45", " it", "'S", " a", "/b", ".\n", "/\n\n", " ÉCOLE"]),
    ],
)
def test_words_are_split_as_the_pre_tokenizer_says(tmp_path: Path, pre: str, words: list[str]) -> None:
    tokenizer = build_tokenizer(GGUFFile(tokenizer_file(tmp_path, "llama", byte_level_keys(pre))))
    text = "HelloWorld's 12345 it'S a/b.\n/\n\n ÉCOLE"
    found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == words


def test_qwen2_equals_transformers_own_class(tmp_path: Path) -> None:
    keys = byte_level_keys("qwen2")
    vocab = {token: token_id for token_id, token in enumerate(keys["tokens"])}
    theirs = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in keys["merges"]])
    ours = build_tokenizer(GGUFFile(tokenizer_file(tmp_path, "qwen2", keys)))
    for text in TEXTS[:-1]:  # its class knows no added tokens of ours
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False), text


def sentencepiece_keys() -> dict[str, Any]:
    """A vocabulary as SentencePiece writes it: specials, 256 bytes, pieces by falling score, characters last."""
    pieces = ["▁t", "he", "in", "▁a", "re", "▁the", "on", "er", "▁s", "▁▁", "▁an", "and", "▁and", "▁in", "ll", "▁se"]
    characters = ["▁", *string.ascii_letters, *string.punctuation]
    specials = ["<unk>", "<s>", "</s>"]
    tokens = [*specials, *(f"<0x{b:02X}>" for b in range(256)), *pieces, *characters, "<|end|>"]
    return {
        "model": "llama",
        "tokens": tokens,
        "scores": [*[0.0] * 259, *(-float(i) for i in range(len(pieces) + len(characters))), 0.0],
        "token_type": [2, 3, 3, *[6] * 256, *[1] * (len(pieces) + len(characters)), 3],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def sentencepiece_ids(keys: Mapping[str, Any], text: str) -> list[int]:
    """SentencePiece BPE by its definition: of all neighbours that make a token, the best score is joined first.

    As llama.cpp has it: pieces between special tokens each begin with a space, spelled "▁".
    """
    tokens = {token: token_id for token_id, token in enumerate(keys["tokens"])}
    special = [token for token, kind in zip(keys["tokens"], keys["token_type"], strict=True) if kind == 3]
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, special))})", text):
        if piece in special:
            ids.append(tokens[piece])
            continue
        symbols = list((" " + piece).replace(" ", "▁")) if piece else []
        while True:
            joined = [
                (-keys["scores"][tokens[a + b]], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in tokens
            ]
            if not joined:
                break
            _, index = min(joined)
            symbols[index : index + 2] = ["".join(symbols[index : index + 2])]
        for symbol in symbols:
            ids += [tokens[symbol]] if symbol in tokens else [tokens[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return ids


@given(
    st.one_of(
        st.sampled_from(TEXTS), st.lists(st.sampled_from(["in", "the", " ", "  and", "</s>", "é", "\n"])).map("".join)
    )
)
@example(" Hello")
@example("Hello</s>Hello</s> Hello")
def test_sentencepiece_by_its_definition(text: str) -> None:
    """A space before each piece of text, one that begins with a space too, and after a special token."""
    ours = sentencepiece_tokenizer()
    ids = ours.encode(text, add_special_tokens=False).ids
    assert ids == sentencepiece_ids(sentencepiece_keys(), text)
    assert ours.encode(text).ids == [1, *ids]
    if "<" not in text:
        assert ours.decode(ids) == text


@functools.cache
def sentencepiece_tokenizer() -> Tokenizer:
    with TemporaryDirectory() as folder:
        return build_tokenizer(GGUFFile(tokenizer_file(Path(folder), "llama", sentencepiece_keys())))


def test_a_token_that_stands_twice_is_named(tmp_path: Path) -> None:
    keys = byte_level_keys("gpt-2")
    file = GGUFFile(tokenizer_file(tmp_path, "llama", {**keys, "tokens": [*keys["tokens"][:-1], "!"]}))
    with pytest.raises(CheckpointError, match="the token '!' stands twice in its vocabulary"):
        build_tokenizer(file)


def test_a_file_that_names_no_pre_tokenizer_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_tokenizer(GGUFFile(tokenizer_file(tmp_path, "llama", byte_level_keys(None))))
    assert "names no pre-tokenizer" in caplog.text


def test_sentencepiece_without_prefix_space(tmp_path: Path) -> None:
    keys = {**sentencepiece_keys(), "add_space_prefix": False}
    tokenizer = build_tokenizer(GGUFFile(tokenizer_file(tmp_path, "llama", keys)))
    assert tokenizer.encode("the", add_special_tokens=False).tokens == ["t", "he"]
    assert tokenizer.decode(tokenizer.encode(" the").ids) == " the"


@functools.cache
def smollm2_file() -> GGUFFile:
    path = open_checkpoint("smollm2").tokenizer_source
    assert path is not None
    return GGUFFile(path)


@functools.cache
def smollm2_tokenizer() -> Tokenizer:
    return build_tokenizer(smollm2_file())


def test_smollm2_splits_digits_before_words() -> None:
    """As its own tokenizer.json: Digits(individual_digits=True), then ByteLevel."""
    tokenizer = smollm2_tokenizer()
    assert tokenizer.encode("In 2026,   7").tokens == ["In", "Ġ", "2", "0", "2", "6", ",", "ĠĠĠ", "7"]
    assert tokenizer.encode("<|im_start|>user\n").ids == [1, 4093, 198]


SMOLLM2_TEXT = st.text(
    st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x04\x06\x13\x14\x16\x1d")
)
"""Its vocabulary lacks a few bytes of UTF-8: these control characters, and planes that hold nothing yet."""


@given(SMOLLM2_TEXT)
@example("e\u0301 \x00 \U0001f44d\U0001f3fd")
def test_smollm2_gives_every_text_back(text: str) -> None:
    tokenizer = smollm2_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@pytest.mark.slow
def test_smollm2_equals_transformers_conversion_but_for_digits() -> None:
    ours, theirs = smollm2_tokenizer(), transformers_tokenizer(smollm2_file().path)
    for text in TEXTS:
        if not any(character.isdigit() for character in text):
            assert ours.encode(text).ids == theirs.encode(text), text


def test_special_tokens_are_added_as_the_file_says(tmp_path: Path) -> None:
    keys = byte_level_keys("gpt-2")
    bos, eos = keys["bos_token_id"], keys["eos_token_id"]

    def ids(changes: Mapping[str, Any]) -> list[int]:
        return build_tokenizer(GGUFFile(tokenizer_file(tmp_path, "llama", {**keys, **changes}))).encode("!").ids

    (plain,) = ids({})
    assert ids({"add_bos_token": True}) == [bos, plain]
    assert ids({"add_bos_token": True, "add_eos_token": True}) == [bos, plain, eos]
    assert ids({"add_bos_token": True, "bos_token_id": None}) == [plain]
    assert ids({"pre": "llama-bpe"}) == [bos, plain]
    assert ids({"pre": "llama-bpe", "add_bos_token": False}) == [plain]


def test_control_and_user_defined_tokens_stay_whole(tmp_path: Path) -> None:
    keys = byte_level_keys("deepseek-r1-qwen")
    names = ["<▁User▁>", "two  words"]
    keys["tokens"] += names
    keys["token_type"] += [3, 4]
    tokenizer = build_tokenizer(GGUFFile(tokenizer_file(tmp_path, "qwen2", keys)))
    last = len(keys["tokens"])
    ids = tokenizer.encode("<▁User▁><think>two  words").ids
    assert ids == [last - 2, last - 3, last - 1]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<▁User▁><think>two  words"
    assert tokenizer.decode(ids) == "<think>two  words"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pre": "some-bpe"}, r"pre-tokenizer 'some-bpe'.*smollm.*qwen2"), ({"model": "t5"}, "tokenizer 't5'")],
)
def test_unknown_kinds_are_refused_by_name(tmp_path: Path, changes: Mapping[str, Any], message: str) -> None:
    file = GGUFFile(tokenizer_file(tmp_path, "llama", {**byte_level_keys("gpt-2"), **changes}))
    with pytest.raises(UnsupportedModelError, match=message):
        build_tokenizer(file)


@pytest.mark.parametrize(
    "changes", [{"merges": ["no where"]}, {"merges": ["nospace"]}, {"merges": None}, {"bos_token_id": 10**6}], ids=str
)
def test_vocabularies_that_contradict_themselves(tmp_path: Path, changes: Mapping[str, Any]) -> None:
    keys = {**byte_level_keys("llama-bpe"), **changes}
    file = GGUFFile(tokenizer_file(tmp_path, "llama", keys))
    with pytest.raises(CheckpointError, match="makes no tokenizer"):
        build_tokenizer(file)
