"""Calls of tools in texts: every family's form, whatever pieces a text comes in, and what is no call after all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade_llm.server.tool_calls import (
    HERMES,
    LLAMA,
    MISTRAL,
    ToolCallReader,
    ToolForm,
    form_of_template,
)

Called = tuple[str, Any]
F, G = '{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "arguments": {"b": "x</tool_call>y"}}'
CALL_F, CALL_G = ("f", {"a": 1}), ("g", {"b": "x</tool_call>y"})
LLAMA_F = F.replace("arguments", "parameters")
FORMS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL}


def read(form: ToolForm, pieces: Sequence[str]) -> tuple[str, list[Called]]:
    """What is said and what is called in all."""
    reader, said, calls = ToolCallReader(form), "", []
    for index, piece in enumerate(pieces):
        text, new = reader.push(piece, finished=index == len(pieces) - 1)
        said, calls = said + text, calls + new
    assert len({call.call_id for call in calls}) == len(calls)
    assert all(len(call.call_id) == 9 and call.call_id.isalnum() for call in calls)
    return said, [(call.name, json.loads(call.arguments)) for call in calls]


CASES: list[tuple[str, str, str, list[Called]]] = [
    ("hermes", f"<tool_call>\n{F}\n</tool_call>", "", [CALL_F]),
    ("hermes", f"I look.\n\n<tool_call>{F}</tool_call>\n<tool_call>{G}</tool_call>", "I look.", [CALL_F, CALL_G]),
    ("hermes", f"<tool_call>{F}", "", [CALL_F]),
    ("hermes", '<tool_call>{"name": "f"}</tool_call> done', " done", [("f", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [CALL_F]),
    ("hermes", "a < b, <tool> and <tool_", "a < b, <tool> and <tool_", []),
    ("hermes", "two spaces  \n", "two spaces  \n", []),
    ("hermes", "<tool_call>f(1)</tool_call> so", "<tool_call>f(1)</tool_call> so", []),
    ("hermes", f'<tool_call>{{"name": "f", "argu</tool_call><tool_call>{F}', None, []),  # type: ignore[list-item]
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>', None, []),  # type: ignore[list-item]
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, []),  # type: ignore[list-item]
    ("hermes", "<tool_call>" + "[" * 20_000, None, []),  # type: ignore[list-item]
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "\\ud800é"}}</tool_call>', "", [("f", {"a": "\ud800é"})]),
    ("mistral", f"[TOOL_CALLS] [{F}, {G}]", "", [CALL_F, CALL_G]),
    ("mistral", f"[TOOL_CALLS]{F}", "", [CALL_F]),
    ("mistral", 'Well. [TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{"b": "x</tool_call>y"}', "Well.", [CALL_F, CALL_G]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"a": 1}', "", [CALL_F]),
    ("mistral", "[TOOL_CALLS] [1, 2]", None, []),  # type: ignore[list-item]
    ("mistral", "[TOOL_CALLS]f(1)", None, []),  # type: ignore[list-item]
    ("mistral", "[TOOL", "[TOOL", []),
    ("llama", LLAMA_F, "", [CALL_F]),
    ("llama", f"\n <|python_tag|>{LLAMA_F}; {LLAMA_F}", "", [CALL_F, CALL_F]),
    ("llama", '{"a": 1}', '{"a": 1}', []),
    ("llama", '{"name": "Rome"}', '{"name": "Rome"}', []),
    ("llama", f"Such as {LLAMA_F}", f"Such as {LLAMA_F}", []),
    ("llama", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    ("llama", "", "", []),
]


@pytest.mark.parametrize(("name", "text", "said", "calls"), CASES)
def test_forms_of_families(name: str, text: str, said: str | None, calls: list[Called]) -> None:
    expected = (text if said is None else said, calls)  # no call after all: nothing is lost
    assert read(FORMS[name], [text]) == expected
    assert read(FORMS[name], [*text[:200], text[200:]]) == expected


PARTS = (F, G, LLAMA_F, "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "f", "[ARGS]", '{"a": "', "}")


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(FORMS)),
    st.lists(st.sampled_from((*PARTS, " ", "\n", "a", ";", "<", "[")), max_size=8),
    st.randoms(use_true_random=False),
)
def test_pieces_say_what_the_whole_says(name: str, parts: list[str], rng: Any) -> None:
    text = "".join(parts)
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = read(FORMS[name], [text])
    assert read(FORMS[name], pieces) == whole
    if not whole[1]:
        assert whole[0] == text


def test_text_is_handed_out_as_soon_as_no_call_can_begin_in_it() -> None:
    reader = ToolCallReader(HERMES)
    pieces = ["I", " see", " <", "b>", "\n", "<tool_", "call>", F, "</tool_call>", "!"]
    told = [reader.push(piece, finished=False) for piece in pieces]
    assert [text for text, _ in told] == ["I", " see", "", " <b>", "", "", "", "", "", "!"]
    assert [len(calls) for _, calls in told] == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("{% for t in tools %}{{ t }}{% endfor %} inside <tool_call></tool_call>", HERMES),
        ("{{ tools }} '[TOOL_CALLS] ['", MISTRAL),
        ('Respond in the format {"name": function name, "parameters": dictionary}', LLAMA),
        ("<tool_call><function=f><parameter=a>", None),
        ("<tool_call>f<arg_key>a</arg_key>", None),
        ("{{ messages }}", None),
    ],
)
def test_a_template_tells_the_form(source: str, form: ToolForm | None) -> None:
    assert form_of_template(source) is form
