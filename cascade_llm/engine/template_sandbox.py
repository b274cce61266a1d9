"""Where chat templates run: Jinja's sandbox, with limits.

It is the environment that transformers renders templates in, with the same filters, functions and tags. What is added:
each loop, call and filter counts as a step, and no text or list may grow past a size, so that a template ends in about
a second whatever it says, on any thread.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from itertools import chain
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["TemplateEnvironment", "TemplateLimitError"]

MOST_STEPS = 1_000_000
MOST_SECONDS = 2.0
"""Of the processor's time, so that a busy machine stops no template."""
MOST_BITS = 1 << 16
"""Of a whole number."""
LARGEST_SIZE = 1 << 24
"""Characters of one text, entries of one list."""
LARGEST_TOTAL = 1 << 28
"""The same of all texts and lists that a template makes."""
WIDE_FIELD = re.compile(r"\d{7,}|\*|\{[^{}]*:[^{}]*\{")
"""A width of millions in a format, or one that an argument gives."""
NOT_VALUES = (Environment, Context, EvalContext)
"""What a filter may get before its value."""
WRITES = frozenset(
    (
        *("capitalize", "center", "e", "escape", "filesizeformat", "forceescape", "format", "indent", "lower"),
        *("pprint", "replace", "safe", "string", "striptags", "title", "tojson", "trim", "truncate", "upper"),
        *("urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"),
    )
)
"""Filters that make a text of any value."""
MULTIPLIES = {"expandtabs": LARGEST_SIZE, "indent": LARGEST_SIZE, "wordwrap": 0, "urlize": 0}
"""What may add to every line or word: how much of a number that they are given."""
ADDS = frozenset(("batch", "center", "ljust", "rjust", "slice", "to_bytes", "truncate", "zfill"))
"""What may make a value as long as a number says."""


class TemplateLimitError(Exception):
    """A template took more steps, time or memory than any conversation needs."""


class _Budget:
    """What one run of a template may still take."""

    def __init__(self) -> None:
        self._num_steps = self._total = 0
        self._end_s = time.thread_time() + MOST_SECONDS

    def step(self) -> None:
        self._num_steps += 1
        if self._num_steps > MOST_STEPS:
            raise TemplateLimitError(f"it made {MOST_STEPS} steps and was not at its end")
        if self._num_steps % 64 == 0 and time.thread_time() > self._end_s:
            raise TemplateLimitError(f"it ran {MOST_SECONDS:g} seconds and was not at its end")

    def take(self, size: int) -> None:
        """Before something of `size` characters or entries is made."""
        self._total += size
        if size > LARGEST_SIZE or self._total > LARGEST_TOTAL:
            raise TemplateLimitError(f"it makes a text or list of {size}, at most {LARGEST_SIZE} can be")

    def counted(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items, each a step."""
        for item in items:
            self.step()
            yield item


class _Generator(CodeGenerator):
    """Has texts joined by the environment, which counts them."""

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        """`a ~ b`."""
        self.write("environment.join_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _GenerationTag(Extension):
    """`{% generation %}`: marks what an assistant says, which changes no text."""

    tags = {"generation"}  # noqa: RUF012  (as the base class has it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Its body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """transformers' environment, for one run: its own budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    code_generator_class = _Generator

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,
            extensions=[_GenerationTag, loopcontrols],
        )
        self._budget = _Budget()
        self.finalize = self.shown
        self.concat = self.join  # type: ignore[method-assign]
        self.filters = {
            name: self._guarded(name, function) for name, function in {**self.filters, "tojson": _to_json}.items()
        } | {"counted": self._budget.counted}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}

    def _generate(self, source: nodes.Template, *args: Any, **options: Any) -> str:
        """The code of a template whose loops count their rounds."""
        for loop in source.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return super()._generate(source, *args, **options)

    def join(self, parts: Iterable[str]) -> str:
        """One text, while it may be."""
        taken = []
        for part in parts:
            self._budget.take(len(part))
            taken.append(part)
        self._budget.take(sum(map(len, taken)))
        return "".join(taken)

    def join_values(self, values: Sequence[Any]) -> str:
        """`a ~ b`: one text of any values."""
        return self.join([str(self.shown(value)) if value is not None else "None" for value in values])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator whose result may be large."""
        self._budget.step()
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "%" and isinstance(left, str):
            self._check_format(left, (right,))
        elif operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
            self._budget.take(len(left) + len(right))
        elif operator in ("*", "**") and numbers:
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            self._budget.take(0 if bits <= MOST_BITS else LARGEST_SIZE + 1)
        elif operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, Sized) and isinstance(count, int):
                    self._budget.take(len(text) * max(count, 0))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Any call that a template makes."""
        self = __self
        self._budget.step()
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str | bytes | int):
            name = getattr(__obj, "__name__", "")
            args = _with_lists(args) if name == "join" else args
            self._check_size(owner, name, (*args, *kwargs.values()))
        return super().call(__context, __obj, *args, **kwargs)

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that checks its arguments first."""

        def filtered(*args: Any, **kwargs: Any) -> Any:
            self._budget.step()
            args = _with_lists(args) if name == "join" else args
            values = [value for value in (*args, *kwargs.values()) if not isinstance(value, NOT_VALUES)]
            if name == "sum" and any(isinstance(value, Sized) and not isinstance(value, str) for value in values[1:]):
                raise TemplateLimitError("sum adds numbers only")
            self._check_size(values[0] if values else "", name, values[1:])
            result = function(*args, **kwargs)
            return self._budget.counted(result) if isinstance(result, Iterator) else result

        if hasattr(function, "jinja_pass_arg"):
            filtered.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return filtered

    def _check_size(self, owner: Any, name: str, values: Sequence[Any]) -> None:
        """Whether a method of a text or number, or a filter, can make something large of these arguments."""
        size = self._written_size(owner) if name in WRITES or isinstance(owner, str) else 0
        texts = max((len(value) for value in values if isinstance(value, str)), default=0)
        number = max((abs(value) for value in values if isinstance(value, int)), default=0)
        if name in ("format", "format_map"):
            self._check_format(str(owner), values)
        elif name == "replace" and len(values) >= 2:
            size += str(owner).count(str(values[0])) * len(str(values[1]))
        elif name == "join":
            separator, items = (owner, values[0]) if isinstance(owner, str) and values else ((*values, "")[0], owner)
            size = self._written_size(items) + (len(items) * len(str(separator)) if isinstance(items, Sized) else 0)
        elif name == "translate":
            size *= max(map(self._written_size, values[0].values()), default=1) if isinstance(values[0], dict) else 1
        elif name in MULTIPLIES:
            size *= 1 + texts + min(number, MULTIPLIES[name])
            size += number
        elif name in ADDS:
            size += number + texts
        self._budget.take(size)

    def _check_format(self, text: str, values: Sequence[Any]) -> None:
        if WIDE_FIELD.search(text):
            raise TemplateLimitError(f"it formats with a width that is too large or not its own: {text[:40]!r}")
        self._budget.take(len(text) * (1 + sum(map(self._written_size, values)) // max(1, text.count("%"))))

    def _written_size(self, value: Any) -> int:
        """Characters of a value as a text, about; stops where these are too many."""
        size, waiting = 0, [value]
        while waiting and size <= LARGEST_SIZE:
            item = waiting.pop()
            self._budget.step()
            size += len(item) if isinstance(item, str | bytes) else 2
            if isinstance(item, Mapping):
                waiting += chain.from_iterable(item.items())
            elif isinstance(item, list | tuple | set | frozenset):
                waiting += item
        return size

    def shown(self, value: Any) -> Any:
        """What is printed of a value: nothing of None, which is the content of a message that only calls tools."""
        if isinstance(value, str):
            return value
        self._budget.take(self._written_size(value))
        return "" if value is None else value


def _with_lists(values: Sequence[Any]) -> tuple[Any, ...]:
    """The same values, those that can be read only once as lists."""
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and abs(indent) > 64:
        raise TemplateLimitError(f"it indents by {indent}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
