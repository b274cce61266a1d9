"""The chat template of each family, on generated conversations: as transformers renders it, or refuses to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError, UndefinedError
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from cascade_llm.engine.tokenizer import Tokenizer, load_tokenizer
from cascade_llm.errors import CheckpointError, RequestError
from cascade_llm.models.architectures import ARCHITECTURES
from tests.engine.family_templates import TEMPLATES
from tests.loader.test_gguf_tokenizer import sentencepiece_keys, tokenizer_file

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TEXT = st.lists(
    st.sampled_from(
        ["Hi", " two ", "\n", "é你 & <b>", "{'a': \"b\"}", "<think>\nso\n</think>\n", "/no_think", "{{ x }}"]
    ),
    min_size=1,
    max_size=3,
).map("".join)
"""No text is empty, or spaces alone: transformers and we refuse to continue other ones of these."""
CALL_ID = st.sampled_from(["abcdefghi", "abcdefghi", "short"])
PROPERTY = st.sampled_from(
    [
        {"type": "string", "description": "a 'name'"},
        {"type": "array", "items": {"type": "number"}},
        {"type": ["string", "null"]},
        {"enum": ["a", "é"]},
        {},
    ]
)
TOOLS = st.none() | st.lists(
    st.builds(
        lambda name, properties, required: {
            "type": "function",
            "function": {
                "name": name,
                "description": "does < it >",
                "parameters": {"type": "object", "properties": properties, "required": list(properties)[:required]},
            },
        },
        st.sampled_from(["add", "look_up"]),
        st.dictionaries(st.sampled_from(["x", "y"]), PROPERTY, min_size=1),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=2,
)


def call(call_id: str, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "add", "arguments": arguments}}


def said(role: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"role": st.just(role), "content": TEXT})


ANSWER = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": TEXT},
    optional={"reasoning_content": TEXT, "thinking": TEXT, "reasoning": TEXT},
)
CALLS = st.fixed_dictionaries(
    {
        "role": st.just("assistant"),
        "content": st.just("") | TEXT,
        "tool_calls": st.lists(
            st.builds(call, CALL_ID, st.dictionaries(st.sampled_from(["x", "y"]), st.integers() | TEXT)),
            min_size=1,
            max_size=2,
        ),
    }
)
RESULT = st.fixed_dictionaries({"role": st.just("tool"), "content": TEXT, "tool_call_id": CALL_ID})
ROUND = st.one_of(
    st.tuples(said("user"), ANSWER),
    st.tuples(said("user"), ANSWER),
    st.builds(lambda *turns: (*turns[:2], *turns[2], turns[3]), said("user"), CALLS, st.lists(RESULT), ANSWER),
    st.tuples(st.sampled_from(["user", "assistant", "tool", "critic"]).flatmap(said)),
)
CONVERSATIONS = st.builds(
    lambda first, rounds, last: [*first, *(turn for turns in rounds for turn in turns), *last],
    st.lists(st.sampled_from(["system", "system", "developer"]).flatmap(said), max_size=1),
    st.lists(ROUND, max_size=3),
    st.sampled_from([(), ("user",)]).flatmap(lambda roles: st.tuples(*map(said, roles))),
).filter(bool)
OPTIONS = st.fixed_dictionaries(
    {"tools": TOOLS, "add_generation_prompt": st.booleans()},
    optional={
        "enable_thinking": st.booleans(),
        "thinking": st.booleans(),
        "reasoning_effort": st.sampled_from(["low", "high"]),
        "documents": st.lists(st.fixed_dictionaries({"text": TEXT}, optional={"doc_id": st.integers(1)}), max_size=2),
        "controls": st.just({"length": "short"}),
    },
)


BACKEND = BackendTokenizer(models.BPE())
TOKENIZERS = {source: Tokenizer(BACKEND, SPECIAL, source) for source in TEMPLATES.values()}


def assert_as_transformers(source: str, messages: Any, options: dict[str, Any]) -> None:
    """The same text, or the same words of the template's own refusal."""
    is_continued = options.get("continue_final_message", False)
    theirs = {**SPECIAL, **options, "add_generation_prompt": options["add_generation_prompt"] and not is_continued}
    try:
        (expected,), _ = render_jinja_template([messages], chat_template=source, **theirs)
    except UndefinedError:
        return  # a conversation that the template is not written for
    except TemplateError as refusal:
        with pytest.raises(RequestError, match=re.escape(str(refusal)) + "$"):
            TOKENIZERS[source].apply_chat_template(messages, **options)
    except (TypeError, ValueError, KeyError):
        return
    else:
        assert TOKENIZERS[source].apply_chat_template(messages, **options) == expected


def test_every_architecture_has_a_template_here() -> None:
    assert set(TEMPLATES) == set(ARCHITECTURES)


@settings(max_examples=25, deadline=None)
@given(messages=CONVERSATIONS, options=OPTIONS)
def test_families_templates_are_rendered_as_by_transformers(messages: Any, options: dict[str, Any]) -> None:
    can_go_on = messages[-1]["role"] == "assistant" and messages[-1]["content"].strip() != ""
    for source in TOKENIZERS:
        assert_as_transformers(source, messages, options)
        if can_go_on:
            assert_as_transformers(source, messages, {**options, "continue_final_message": True})


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("architecture", ["qwen3", "gpt_oss"])
def test_what_an_assistant_thought_is_read_by_any_name(architecture: str, name: str) -> None:
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4", name: "easy"}]
    options: dict[str, Any] = {"tools": None, "add_generation_prompt": False}
    assert_as_transformers(TEMPLATES[architecture], messages, options)
    assert "easy" in TOKENIZERS[TEMPLATES[architecture]].apply_chat_template(messages, **options)


PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), min_size=1, max_size=3)


@given(
    rules=st.none() | PARTS,
    turns=st.lists(st.one_of(PARTS, TEXT), min_size=1, max_size=4),
    is_continued=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_parts_reach_a_template_that_reads_them_as_they_are(rules: Any, turns: list[Any], is_continued: bool) -> None:
    """Gemma 3's trims each part by itself, which one text of all of them would not be."""
    messages = [{"role": "system", "content": rules}] if rules else []
    messages += [{"role": "user" if i % 2 == 0 else "assistant", "content": turn} for i, turn in enumerate(turns)]
    options = {"add_generation_prompt": True, "continue_final_message": is_continued}
    last = turns[-1]
    if is_continued and not (last if isinstance(last, str) else last[-1]["text"]).strip():
        return
    assert_as_transformers(TEMPLATES["gemma3_text"], messages, options)


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3"])
def test_a_template_that_takes_contents_for_texts_gets_one_of_all_parts(name: str) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    given, joined = ([{"role": "user", "content": content}] for content in (parts, "a b"))
    tokenizer = TOKENIZERS[TEMPLATES[name]]
    assert tokenizer.apply_chat_template(given) == tokenizer.apply_chat_template(joined)


def test_a_content_that_is_iterated_in_one_branch_only_may_be_a_text_in_another() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% else %}{{ m.content + '!' }}{% endif %}{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}]
    message = {"role": "assistant", "content": parts}
    assert Tokenizer(BACKEND, SPECIAL, source).apply_chat_template([message]) == "a!"


NAMED = {"default": "plain", "tool_use": "{{ tools | length }} tools", "rag": "{{ documents[0].text }}"}


def test_a_gguf_file_may_have_several_templates_by_name(tmp_path: Path) -> None:
    keys = {**sentencepiece_keys(), "model": "llama"}
    path = tokenizer_file(tmp_path, "llama", keys, other_keys=gguf_templates(NAMED))
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    ask = [{"role": "user", "content": "a"}]
    assert tokenizer.apply_chat_template(ask) == "plain"
    assert tokenizer.apply_chat_template(ask, tools=[{}, {}]) == "2 tools"
    assert tokenizer.apply_chat_template(ask, chat_template="rag", documents=[{"text": "d"}]) == "d"


@pytest.mark.parametrize("is_listed", [False, True])
def test_a_folder_s_own_files_go_before_what_tokenizer_config_says(tmp_path: Path, is_listed: bool) -> None:
    """One of them is the default, others have names; transformers reads the same."""
    stated = {"default": "stated", "tool_use": "stated tools"} if is_listed else "stated"
    Tokenizer(BACKEND, SPECIAL, stated).save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["mixtral"])
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text(NAMED["rag"])
    ours, theirs = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert ours is not None
    ask: Any = [{"role": "user", "content": "é"}]
    assert ours.apply_chat_template(ask) == theirs.apply_chat_template(ask, tokenize=False) == "<s> [INST] é [/INST]"
    options: Any = {"chat_template": "rag", "documents": [{"text": "d"}]}
    assert ours.apply_chat_template(ask, **options) == theirs.apply_chat_template(ask, tokenize=False, **options) == "d"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokenizer.chat_template": 5}, r"tokenizer\.chat_template is a int, not a text"),
        ({"tokenizer.chat_templates": "rag"}, r"tokenizer\.chat_templates is a str, not a list"),
        ({"tokenizer.chat_templates": ["rag"]}, r"tokenizer\.chat_template\.rag is a NoneType, not a text"),
    ],
)
def test_a_template_of_a_gguf_file_that_is_none_is_named(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(tokenizer_file(tmp_path, "llama", sentencepiece_keys(), other_keys=keys))


def gguf_templates(named: dict[str, str]) -> dict[str, Any]:
    """The keys that the `gguf` package writes."""
    writer = GGUFWriter(None, "llama")
    writer.add_chat_template([{"name": name, "template": text} for name, text in named.items()])
    return {name: value.value for name, value in writer.kv_data[0].items() if name.startswith("tokenizer.")}
