"""Chat templates: as transformers renders them, and never more than a limit of steps, time and memory."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from cascade_llm.engine import template_sandbox
from cascade_llm.engine.chat_template import ChatTemplate
from cascade_llm.errors import RequestError

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "What is 2 + 2?\n"},
    {"role": "assistant", "content": "<think>easy</think>4 "},
]
TOOL = {"type": "function", "function": {"name": "add", "description": "a < b & 'c' é", "parameters": {"a": 1}}}

TEMPLATES = [
    "{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}{{ loop.index }}/{{ loop.length }} {{ m.content }}"
    "{% if not loop.last %}{{ '\\n' }}{% else %}.{% endif %}{% endfor %}",
    "{%- set ns = namespace(text='', n=0) -%}\n{%- for m in messages[::-1] %}\n"
    "  {%- set ns.text = ns.text + m.role ~ ns.n %}{% set ns.n = ns.n + 1 %}\n"
    "  {% if ns.n == 2 %}{% break %}{% endif %}"
    "\n{%- endfor %}{{ ns.text }}|{{ ns.n * 2 ** 3 % 7 }}",
    "{% macro show(m, depth=1) %}{{ '-' * depth }}{{ m.content.split('</think>')[-1].lstrip() | upper }}{% endmacro %}"
    "{% for m in messages %}{{ show(m, loop.index) }}{% endfor %}",
    "{% if tools %}{% for t in tools %}{{ t | tojson }}{{ t | tojson(indent=2) }}{% endfor %}{% endif %}"
    "{{ messages | length }}"
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{{ messages | map(attribute='role') | join(', ') }}",
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}"
    "{{ '%s: %5.2f' | format('a', 1.5) }}{{ '{:>5}'.format('x') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | tojson }}"
    "{{ 'abc' | replace('b', 'xx') | center(9) }}",
    "{% set items = range(5) | list %}{{ items | sum }} {{ items[1:3] }} {{ 'a' in 'abc' }} {{ none is none }} "
    "{{ 3 // 2 }}"
    "{{ messages[0].content | indent(2) }} {{ undefined_name | default('d') }} {{ items | batch(2) | list }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_as_transformers_renders(source: str, tools: Any) -> None:
    options = {"tools": tools, "add_generation_prompt": True, "bos_token": "<s>"}
    (expected,), _ = render_jinja_template([TURNS], chat_template=source, **options)
    assert ChatTemplate(source).render(TURNS, False, **options) == expected


@pytest.mark.parametrize("source", TEMPLATES[:1] + TEMPLATES[5:6])
@pytest.mark.parametrize("content", ["The answer", "The answer ", " twice twice"])
def test_a_final_message_is_continued_as_transformers_does(source: str, content: str) -> None:
    source = source.split("{{ '%s")[0]
    turns = [*TURNS[:2], {"role": "assistant", "content": content}]
    (expected,), _ = render_jinja_template([turns], chat_template=source, continue_final_message=True)
    assert ChatTemplate(source).render(turns, True, tools=None, add_generation_prompt=False) == expected


NESTED = "{% set a = ['x'] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}"
DOUBLED = "{% set ns = namespace(x='a') %}{% for i in range(60) %}"
ENDLESS = [
    "{{ 'a' * 10**10 }}",
    "{{ [0] * 10**10 }}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    DOUBLED + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    DOUBLED + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    DOUBLED + "{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    DOUBLED + "{% set ns.x = '{}{}'.format(ns.x, ns.x) %}{% endfor %}",
    DOUBLED + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    DOUBLED + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 2 ** 1000000000 }}",
    "{{ 'a' | center(10**10) }}",
    "{{ 'a'.ljust(9999999999) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10000000000, 1) }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:>{w}}'.format(1, w=9999999999) }}",
    "{{ ('a' * 1000000).replace('a', 'a' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'a' * 1000000) }}",
    "{{ ('\\t' * 1000000).expandtabs(100000) }}",
    "{{ ('a\\n' * 100000) | indent(10**6) }}",
    "{{ ('a b ' * 1000000) | wordwrap(1, true, 'b' * 1000000) }}",
    "{{ (1).to_bytes(10**10, 'little') }}",
    "{{ [1] | batch(10**10, 0) | list }}",
    "{{ [1] | slice(10**10) | list }}",
    "{{ 'x' | tojson(indent=10**9) }}",
    "{{ range(10**10) | list }}",
    "{{ range(100000) | map('string') | map('center', 100000) | join }}",
    "{{ ([[1] * 1000] * 10000) | sum(start=[]) }}",
    "{{ lipsum(n=10**8) }}",
    NESTED + "{{ c }}",
    NESTED + "{{ c | tojson }}",
    NESTED + "{{ c | string | length }}",
    NESTED + "{{ 'a' ~ c }}",
    NESTED + "{{ '%s' % c }}",
    NESTED + "{{ '{}'.format(c) }}",
]


@pytest.mark.parametrize("source", [*ENDLESS[:-4], *(pytest.param(s, marks=pytest.mark.slow) for s in ENDLESS[-4:])])
def test_a_template_without_end_is_an_error_at_once(source: str) -> None:
    template = ChatTemplate(source)
    start_s = time.thread_time()
    with pytest.raises(RequestError, match="the chat template"):
        template.render(TURNS, False)
    assert time.thread_time() - start_s < 2 * template_sandbox.MOST_SECONDS


def test_limits_hold_off_the_main_thread() -> None:
    errors: list[str] = []

    def work() -> None:
        try:
            ChatTemplate(ENDLESS[2]).render(TURNS, False)
        except RequestError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == [
        f"the chat template was stopped: it made {template_sandbox.MOST_STEPS} steps and was not at its end"
    ]


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% nothing %}", "{{ x | no_such_filter }}", "a" * 2**20 + "b"])
def test_what_is_no_template_is_said(source: str) -> None:
    with pytest.raises(RequestError, match="the chat template"):
        ChatTemplate(source).render(TURNS, False)


def test_the_sandbox_stays_shut() -> None:
    for source in (
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ):
        with pytest.raises(RequestError, match="refuses these messages"):
            ChatTemplate(source).render(TURNS, False)


@pytest.mark.parametrize(
    "source", ["{{ messages[0].role + messages[0].content }}", "{{ messages[0].role }}{{ messages[0].content }}"]
)
def test_a_message_that_only_calls_tools_has_no_text(source: str) -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert ChatTemplate(source).render([message], False) == "assistant"


ATOMS = ["messages", "'a b'", "'%s'", "'{}'", "10**9", "99999", "range(99999)", "x", "['a', x]", "{'k': x}", "none"]
OPERATORS = ["+", "*", "**", "~", "%", "//", "in", "==", "and"]
FILTERS = ["list", "string", "join", "center", "tojson", "length", "sort", "unique", "upper", "pprint", "sum", "first"]
FILTERS += [
    "replace",
    "format",
    "indent",
    "batch",
    "slice",
    "wordwrap",
    "urlize",
    "xmlattr",
    "map",
    "truncate",
    "groupby",
]
METHODS = ["ljust", "join", "replace", "format", "split", "expandtabs", "items", "zfill", "to_bytes", "translate"]


def compound(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    arguments = st.lists(part, max_size=2).map(", ".join)
    return st.one_of(
        st.builds("({} {} {})".format, part, st.sampled_from(OPERATORS), part),
        st.builds("({} | {}({}))".format, part, st.sampled_from(FILTERS), arguments),
        st.builds("({}).{}({})".format, part, st.sampled_from(METHODS), arguments),
        st.builds("({}[{}])".format, part, part),
    )


EXPRESSION = st.recursive(st.sampled_from(ATOMS), compound, max_leaves=6)
STATEMENT = st.one_of(
    st.builds("{{{{ {} }}}}".format, EXPRESSION),
    st.builds("{{% set x = {} %}}".format, EXPRESSION),
    st.builds("{{% for x in {} %}}{{{{ {} }}}}{{% endfor %}}".format, EXPRESSION, EXPRESSION),
    st.builds("{{% set x %}}{{{{ {} }}}}{{{{ x }}}}{{% endset %}}".format, EXPRESSION),
)


@pytest.mark.slow
@settings(max_examples=5000, deadline=None)
@given(st.lists(STATEMENT, min_size=1, max_size=5).map("".join))
def test_any_template_renders_or_is_refused(source: str) -> None:
    start_s = time.thread_time()
    with suppress(RequestError):
        assert len(ChatTemplate(source).render(TURNS, False)) <= template_sandbox.LARGEST_SIZE
    assert time.thread_time() - start_s < 2 * template_sandbox.MOST_SECONDS, source
