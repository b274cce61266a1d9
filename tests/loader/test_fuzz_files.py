"""Files of models with anything in them: they open, or one of our errors says what is wrong."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cascade_llm.engine.tokenizer import load_tokenizer
from cascade_llm.errors import CascadeError
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.loader.gguf_file import GGUFFile
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from tests.loader.gguf_files import metadata_of, write_gguf, write_model
from tests.models.checkpoints import tiny_model

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "4",
    "\ud800", "\x00", [], [[]], [None], [1, "a"], ["a"], {}, {"a": 1}, {"type": "BPE"}, {"type": None},
]  # fmt: skip
ARRAYS: list[Any] = [[1, 2, 3], ["a", "b"], [0.5], [True]]
VOCABULARY = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab", "abc", "\u0120"]
GGUF_TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": VOCABULARY,
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(VOCABULARY) - 3),
    "tokenizer.ggml.scores": [-float(i) for i in range(len(VOCABULARY))],
    "tokenizer.ggml.merges": ["a b", "ab c"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ messages }}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in shards, with a tokenizer."""
    path = tmp_path_factory.mktemp("whole")
    tiny_model("llama").save_pretrained(path, max_shard_size="50KB")
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "c")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(path)
    return path


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from places(inner)


def opened(path: Path) -> Checkpoint | None:
    """Everything that a start reads before the weights are loaded; None where one of our errors was raised."""
    try:
        checkpoint = open_checkpoint(path)
        model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
        load_tokenizer(checkpoint.tokenizer_source)
    except CascadeError:
        return None
    return checkpoint


def damage_json(source: Path, target: Path, seed: int) -> str:
    """Put any value at any place of one file; returns what was done."""
    draw = random.Random(seed)
    name = draw.choice(JSON_FILES)
    content = json.loads((source / name).read_text())
    container, key = draw.choice(list(places(content)))
    value = draw.choice(VALUES)
    if draw.random() < 0.1:
        del container[key]
    else:
        container[key] = value
    text = json.dumps(content)
    if draw.random() < 0.1:
        text = draw.choice([text[: draw.randrange(len(text))], "[" * 10**5, "\ufeff" + text, json.dumps(value)])
    (target / name).write_text(text, errors="surrogatepass")
    return f"seed {seed}: {name}, {key} is {str(value)[:40]}"


def fuzz_json(folder: Path, target: Path, seeds: range) -> None:
    shutil.copytree(folder, target)
    for seed in seeds:
        told = damage_json(folder, target, seed)
        try:
            opened(target)
        except BaseException as error:
            raise AssertionError(told) from error
        for name in JSON_FILES:
            shutil.copy(folder / name, target / name)


def fuzz_keys(path: Path, seeds: range) -> None:
    """GGUF files with any type of value under a known key."""
    model = tiny_model("llama")
    keys = {**{f"llama.{name}": value for name, value in metadata_of(model).items()}, **GGUF_TOKENIZER}
    values = [value for value in VALUES if isinstance(value, bool | float | str) and value not in ("\ud800", 1e308)]
    for seed in seeds:
        draw = random.Random(seed)
        changed = dict(keys)
        for key in draw.sample(sorted(keys), draw.choice([1, 1, 2])):
            changed[key] = draw.choice([None, 0, 1, 7, 2**32 - 1, *values, *ARRAYS])
        write_model(path, model, dict.fromkeys(metadata_of(model)), other_keys=changed)
        try:
            opened(path)
        except BaseException as error:
            raise AssertionError(f"seed {seed}: { {k: v for k, v in changed.items() if v != keys[k]} }") from error


def fuzz_bytes(path: Path, seeds: range) -> None:
    """GGUF files with a few bytes, or a length, of the header changed."""
    write_gguf(path, "llama", metadata_of(tiny_model("llama")), other_keys=GGUF_TOKENIZER)
    whole = path.read_bytes()
    for seed in seeds:
        draw = random.Random(seed)
        content = bytearray(whole)
        for _ in range(draw.choice([1, 2, 5])):
            at = draw.randrange(len(content) - 8)
            change = [bytes([draw.randrange(256)]), struct.pack("<Q", draw.choice([0, 1, 2**32, 2**63, 2**64 - 1]))]
            piece = draw.choice(change)
            content[at : at + len(piece)] = piece
        path.write_bytes(content[: draw.choice([len(content), draw.randrange(len(content))])])
        try:
            GGUFFile(path)
        except CascadeError:
            continue
        except BaseException as error:
            raise AssertionError(f"seed {seed}") from error


def test_the_whole_folder_opens(folder: Path) -> None:
    assert opened(folder) is not None


def test_any_value_in_any_json(folder: Path, tmp_path: Path) -> None:
    fuzz_json(folder, tmp_path / "damaged", range(60))


def test_any_value_in_any_gguf_key(tmp_path: Path) -> None:
    fuzz_keys(tmp_path / "damaged.gguf", range(20))


def test_any_byte_of_a_gguf_header(tmp_path: Path) -> None:
    fuzz_bytes(tmp_path / "damaged.gguf", range(300))


@pytest.mark.slow
def test_many_values_in_any_json(folder: Path, tmp_path: Path) -> None:
    fuzz_json(folder, tmp_path / "damaged", range(1000, 4000))


@pytest.mark.slow
def test_many_values_in_any_gguf_key(tmp_path: Path) -> None:
    fuzz_keys(tmp_path / "damaged.gguf", range(1000, 3000))


@pytest.mark.slow
def test_many_bytes_of_a_gguf_header(tmp_path: Path) -> None:
    fuzz_bytes(tmp_path / "damaged.gguf", range(1000, 31000))
