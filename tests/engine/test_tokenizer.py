from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cascade_llm.engine.tokenizer import Tokenizer, load_tokenizer
from cascade_llm.errors import CheckpointError, RequestError
from cascade_llm.loader.resolve import open_checkpoint
from tests.loader.test_gguf_tokenizer import SMOLLM2_TEXT, TEXTS, sentencepiece_keys, tokenizer_file

IM_START, IM_END = 1, 2


def smollm2() -> Tokenizer:
    tokenizer = load_tokenizer(open_checkpoint("smollm2").tokenizer_source)
    assert tokenizer is not None
    return tokenizer


TOKENIZER = smollm2()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2's tokenizer as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("tokenizer")
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend, **special)
    wrapped.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    wrapped.save_pretrained(path)
    return path


def test_ids_and_facts_of_smollm2() -> None:
    assert TOKENIZER.vocab_size == 49152
    assert TOKENIZER.special_token_ids == frozenset(range(17))
    assert (TOKENIZER.bos_token_id, TOKENIZER.eos_token_ids) == (IM_START, {IM_END})
    assert TOKENIZER.encode("hi") == TOKENIZER.encode("hi", add_special_tokens=False) == [6004]
    assert TOKENIZER.decode([IM_START, 6004, IM_END]) == "hi"
    assert TOKENIZER.decode([IM_START, 6004, IM_END], skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"
    assert TOKENIZER.decode([6004, 10**6]) == "hi"
    assert TOKENIZER.decode([]) == ""


def test_no_source_no_tokenizer() -> None:
    assert load_tokenizer(None) is None


def test_a_folder_gives_the_same_ids(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    reference = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == TOKENIZER.encode(text) == reference.encode(text)
    assert tokenizer.special_token_ids == TOKENIZER.special_token_ids
    assert tokenizer.eos_token_ids == {IM_END}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}]) == "user: a\n"


def test_truncation_and_padding_of_a_folder_are_not_applied(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    for text in TEXTS:
        assert tokenizer.encode(text) == TOKENIZER.encode(text)


@pytest.mark.parametrize("content", ["{", "{}", '{"version": "1.0", "model": {"type": "Unknown"}}'])
def test_broken_tokenizer_files_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match=rf"the tokenizer in {tmp_path} cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_model_alone_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr("cascade_llm.engine.tokenizer.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)


def test_a_panic_of_the_rust_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 raises it."""

    def panic(*args: object, **options: object) -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr("cascade_llm.engine.tokenizer.BackendTokenizer.from_file", panic)
    with pytest.raises(CheckpointError, match="PanicException: called"):
        load_tokenizer(folder)


@pytest.mark.parametrize("file", ["chat_template.json", "chat_template.jinja"])
def test_a_chat_template_in_a_file_of_its_own(folder: Path, tmp_path: Path, file: str) -> None:
    for path in folder.iterdir():
        if not path.name.startswith("chat_template"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    (tmp_path / file).write_text(json.dumps({"chat_template": template}) if file.endswith("json") else template)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}]) == "<a>"
    if file.endswith("json"):
        (tmp_path / file).write_text('{"chat_template": 5}')
        with pytest.raises(CheckpointError, match="chat_template is a int"):
            load_tokenizer(tmp_path)


def test_transformers_verbosity_is_left_as_it_was(folder: Path) -> None:
    logger = logging.getLogger("transformers")
    before = logger.level
    load_tokenizer(folder)
    assert logger.level == before


def test_threads_may_share_a_tokenizer() -> None:
    expected = [TOKENIZER.encode(text) for text in TEXTS]
    results: list[list[list[int]]] = []

    def work() -> None:
        results.extend([TOKENIZER.encode(text) for text in TEXTS] for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [expected] * 80


def test_chat_is_tokenized_without_added_tokens(tmp_path: Path) -> None:
    keys = {**sentencepiece_keys(), "add_bos_token": True}
    path = tokenizer_file(tmp_path, "llama", keys)
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    assert tokenizer.encode("in")[0] == tokenizer.bos_token_id == 1
    template = "{{ bos_token }}{{ messages[0].content }}"
    ids = tokenizer.encode_chat([{"role": "user", "content": "in"}], chat_template=template)
    assert ids.count(1) == 1


def test_smollm2_s_template() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert TOKENIZER.apply_chat_template(messages, add_generation_prompt=False) == text
    assert TOKENIZER.apply_chat_template(messages) == text + "<|im_start|>assistant\n"
    assert TOKENIZER.decode(TOKENIZER.encode_chat(messages), skip_special_tokens=False) == (
        text + "<|im_start|>assistant\n"
    )


def test_content_in_parts_is_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert TOKENIZER.encode_chat([{"role": "user", "content": parts}]) == TOKENIZER.encode_chat(
        [{"role": "user", "content": "ab"}]
    )


def test_template_arguments_reach_the_template() -> None:
    template = "{{ tools | length }} {{ mood }}"
    message = {"role": "user", "content": ""}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert TOKENIZER.apply_chat_template([message], chat_template=template, tools=[tool], mood="good") == "1 good"


GOOD = {"role": "user", "content": "hi"}

MALFORMED: list[tuple[Any, str]] = [
    ([], "messages is empty"),
    ("hi", "messages is 'hi'"),
    (GOOD, "messages is"),
    (5, "messages is 5"),
    ([GOOD, "hi"], r"messages\[1\] is 'hi'"),
    ([{"content": "hi"}], r"messages\[0\] has the role None"),
    ([GOOD, {"role": 3, "content": "hi"}], r"messages\[1\] has the role 3"),
    ([GOOD, GOOD, {"role": "user"}], r"messages\[2\] has content of type NoneType"),
    ([{"role": "user", "content": 7}], r"messages\[0\] has content of type int"),
    ([GOOD, {"role": "user", "content": [{"type": "image_url"}]}], r"messages\[1\] has a part that is no text"),
]


@pytest.mark.parametrize(("messages", "error"), MALFORMED, ids=[error for _, error in MALFORMED])
def test_malformed_messages_are_named(messages: Any, error: str) -> None:
    for encode in (TOKENIZER.apply_chat_template, TOKENIZER.encode_chat):
        with pytest.raises(RequestError, match=error):
            encode(messages)


def test_what_a_template_refuses_is_the_request_s_error() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="roles must alternate"):
        TOKENIZER.encode_chat([GOOD], chat_template=template)


def test_missing_template_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_file(tmp_path, "llama", sentencepiece_keys()))
    assert tokenizer is not None
    with pytest.raises(RequestError, match=r"no chat template.*chat_template="):
        tokenizer.encode_chat([GOOD])


def character_by_character(text: str) -> list[int]:
    """Tokens that spell the text as no tokenizer would cut it."""
    return [token for character in text for token in TOKENIZER.encode(character, add_special_tokens=False)]


@given(
    turns=st.lists(st.tuples(SMOLLM2_TEXT, SMOLLM2_TEXT, st.booleans()), min_size=1, max_size=4),
    cut=st.sampled_from([character_by_character, lambda text: TOKENIZER.encode(text, add_special_tokens=False)]),
)
def test_history_ids_stay_identical_from_turn_to_turn(
    turns: list[tuple[str, str, bool]], cut: Callable[[str], list[int]]
) -> None:
    messages: list[dict[str, str]] = []
    history: list[int] = []
    for question, answer, ended in turns:
        messages.append({"role": "user", "content": question})
        prompt = TOKENIZER.encode_continuation(history, messages)
        assert prompt[: len(history)] == history
        assert TOKENIZER.decode(prompt, skip_special_tokens=False) == TOKENIZER.apply_chat_template(messages)
        history = prompt + cut(answer) + [IM_END] * ended
        messages.append({"role": "assistant", "content": answer})


def test_the_first_turn_is_encode_chat() -> None:
    assert TOKENIZER.encode_continuation([], [GOOD]) == TOKENIZER.encode_chat([GOOD])


def test_changed_history_is_encoded_anew() -> None:
    history = TOKENIZER.encode_chat([GOOD]) + character_by_character("Hello!") + [IM_END]
    changed = [GOOD, {"role": "assistant", "content": "Bye!"}, GOOD]
    assert TOKENIZER.encode_continuation(history, changed) == TOKENIZER.encode_chat(changed)
    stripped = "{% for m in messages %}{{ m.content | trim }}{% endfor %}"
    messages = [{"role": "user", "content": " a "}, GOOD]
    history = TOKENIZER.encode_chat(messages[:1])
    assert TOKENIZER.encode_continuation(history, messages, chat_template=stripped) == TOKENIZER.encode_chat(
        messages, chat_template=stripped
    )


def test_a_seam_that_would_grow_a_space_is_encoded_anew(tmp_path: Path) -> None:
    """SentencePiece puts a space before the first word of each text that it is given."""
    tokenizer = load_tokenizer(tokenizer_file(tmp_path, "llama", sentencepiece_keys()))
    assert tokenizer is not None
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "in"}, {"role": "assistant", "content": "and"}]
    history = tokenizer.encode_chat(messages[:1], chat_template=template)
    whole = tokenizer.encode_chat(messages, chat_template=template)
    assert tokenizer.encode_continuation(history, messages, chat_template=template) == whole
    assert tokenizer.decode(whole) == "inand"
    messages[1]["content"] = "</s>and"
    prompt = tokenizer.encode_continuation(history, messages, chat_template=template)
    assert prompt[: len(history) + 1] == [*history, 2]
    assert prompt == tokenizer.encode("in</s>and", add_special_tokens=False)
