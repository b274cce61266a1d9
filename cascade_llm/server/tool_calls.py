"""Calls of tools in a model's text: the forms in which families write them, and how they are found piece by piece.

Hermes and Qwen write `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one after the other, also behind text.
Mistral writes `[TOOL_CALLS]` and a list of such objects, or, in later versions, each name with its arguments behind it.
Llama 3 answers with nothing but `{"name": ..., "parameters": {...}}`, several with ";" between them.

What turns out to be no call is text: nothing that a model says is lost.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

__all__ = ["HERMES", "LLAMA", "MISTRAL", "ToolCall", "ToolCallReader", "ToolForm", "form_of_template"]

ID_LETTERS = string.ascii_letters + string.digits
ID_LEN = 9
"""As Mistral's templates want it."""
NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
SPACES = re.compile(r"[\s;]*")
MISTRAL_NAME = re.compile(r"(?:\[TOOL_CALLS\])?\s*([\w.:/-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)")
LLAMA_FORM = re.compile(r'"name".{0,40}"parameters"')
OTHER_TAGS = ("<function=", "<arg_key>")
"""What stands inside of <tool_call> in templates whose calls are no JSON."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that a model asks for."""

    name: str
    arguments: str
    """A JSON object."""
    call_id: str = field(default_factory=lambda: "".join(secrets.choice(ID_LETTERS) for _ in range(ID_LEN)))


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How calls are written."""

    openings: Sequence[str]
    """What calls begin with; "{" belongs to the call itself."""
    closing: str | None
    """What ends a call; None is the end of the text."""
    is_whole_answer: bool
    """Whether nothing but white space may stand before a call."""
    parse: Callable[[str], Sequence[ToolCall] | None]
    """The calls between opening and closing; None where there is anything else."""
    has_special_tokens: bool
    """Whether openings are special tokens, which a text leaves out by itself."""


class ToolCallReader:
    """Divides the text of one answer, as it comes, into what is said and what is called."""

    def __init__(self, form: ToolForm) -> None:
        self._form = form
        self._held = ""
        """Not handed out yet: it may be a call's, or come before one."""
        self._opening: str | None = None
        """Of the call whose text is held; None outside of one."""
        self._spaces = ""
        """Before that call: text, where it turns out to be none."""
        self._has_spoken = False
        """Whether anything but white space was said."""

    def push(self, text: str, *, finished: bool) -> tuple[str, list[ToolCall]]:
        """What is said, and what is called, now that `text` has come; the last text is `finished`."""
        self._held += text
        said, calls = "", list[ToolCall]()
        while True:
            if self._opening is None:
                said += self._speak(finished)
            if self._opening is None:
                return said, calls
            found = self._close(finished)
            if found is None:
                return said, calls
            if isinstance(found, str):
                said, self._has_spoken = said + found, True
            else:
                calls += found

    def _speak(self, finished: bool) -> str:
        """The text before the next call, without the white space that ends it, or as far as no call can begin."""
        held, form = self._held, self._form
        if form.is_whole_answer and self._has_spoken:
            found = None
        else:
            found = min(((p, o) for o in form.openings if (p := held.find(o)) >= 0), default=None)
        if found is not None and form.is_whole_answer and held[: found[0]].strip():
            found = None
        if found is None:
            end = len(held) if finished else self._num_sure(held)
            said, self._held = held[:end], held[end:]
        else:
            place, self._opening = found
            said, self._held = held[:place].rstrip(), held[place + len(self._opening) :]
            self._spaces = held[len(said) : place]
        self._has_spoken = self._has_spoken or bool(said.strip())
        return said

    def _num_sure(self, held: str) -> int:
        """Characters that cannot be white space before a call, nor the beginning of what opens one."""
        if self._form.is_whole_answer:
            begun = held.lstrip()
            return 0 if not self._has_spoken and any(o.startswith(begun) for o in self._form.openings) else len(held)
        cut = len(held)
        for opening in self._form.openings:
            parts = (size for size in range(len(opening) - 1, 0, -1) if held.endswith(opening[:size]))
            cut = min(cut, len(held) - next(parts, 0))
        return len(held[:cut].rstrip())

    def _close(self, finished: bool) -> Sequence[ToolCall] | str | None:
        """The calls that were opened, or their text where they are none; None where their end has not come."""
        opening, closing = self._opening, self._form.closing
        assert opening is not None
        before = opening if opening == "{" else ""
        end = self._held.find(closing) if closing is not None else -1
        while closing is not None and end >= 0:
            body = before + self._held[:end]
            calls = self._form.parse(body)
            if calls is None and _ends_inside_text(body):  # the closing is spelled out in an argument
                end = self._held.find(closing, end + 1)
                continue
            self._opening, self._held = None, self._held[end + len(closing) :]
            return self._spaces + opening + body[len(before) :] + closing if calls is None else calls
        if not finished:
            return None
        body, self._opening, self._held = self._held, None, ""
        calls = self._form.parse(before + body)
        return self._spaces + opening + body if calls is None else calls


def form_of_template(source: str) -> ToolForm | None:
    """The form that a chat template tells its model; None where it is none of these."""
    if "[TOOL_CALLS]" in source:
        return MISTRAL
    if "<tool_call>" in source:
        return None if any(tag in source for tag in OTHER_TAGS) else HERMES
    return LLAMA if LLAMA_FORM.search(source) else None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


def _call(name: object, arguments: object) -> ToolCall | None:
    if isinstance(arguments, str):
        values = _values(arguments)
        arguments = values[0] if values is not None and len(values) == 1 else None
    if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(arguments, dict):
        return None
    text = json.dumps(arguments, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can escape and UTF-8 has not
        text = json.dumps(arguments)
    return ToolCall(name, text)


def _calls(values: Sequence[object] | None, key: str, *, may_lack: bool) -> Sequence[ToolCall] | None:
    """A call for each value; None where one of them is none, or there are none."""
    calls = []
    for value in values or ():
        known = isinstance(value, dict) and (may_lack or key in value)
        call = _call(value.get("name"), value.get(key, {})) if known and isinstance(value, dict) else None
        if call is None:
            return None
        calls.append(call)
    return calls or None


def _values(text: str) -> list[Any] | None:
    """The JSON values of a text, with white space or semicolons between them; None where anything else is there."""
    values, place = [], SPACES.match(text).end()  # type: ignore[union-attr]
    while place < len(text):
        try:
            value, place = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError):
            return None
        values.append(value)
        place = SPACES.match(text, place).end()  # type: ignore[union-attr]
    return values


def _ends_inside_text(body: str) -> bool:
    """Whether JSON breaks off in the middle of a text."""
    try:
        json.loads(body)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string")
    except (ValueError, RecursionError):
        return False
    return False


def _parse_hermes(body: str) -> Sequence[ToolCall] | None:
    return _calls(_values(body), "arguments", may_lack=True)


def _parse_llama(body: str) -> Sequence[ToolCall] | None:
    return _calls(_values(body), "parameters", may_lack=False)


def _parse_mistral(body: str) -> Sequence[ToolCall] | None:
    text = body.strip()
    if text.startswith(("[{", "[ {", "{")):
        values = _values(text)
        if values is not None and len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        return _calls(values, "arguments", may_lack=True)
    calls, place = [], 0
    while place < len(text):
        named = MISTRAL_NAME.match(text, place)
        try:
            value, place = DECODER.raw_decode(text, named.end() if named else place)
        except (ValueError, RecursionError):
            return None
        call = _call(named[1], value) if named else None
        if call is None:
            return None
        calls.append(call)
        place = SPACES.match(text, place).end()  # type: ignore[union-attr]
    return calls or None


HERMES = ToolForm(("<tool_call>",), "</tool_call>", False, _parse_hermes, has_special_tokens=False)
LLAMA = ToolForm(("<|python_tag|>", "{"), None, True, _parse_llama, has_special_tokens=True)
MISTRAL = ToolForm(("[TOOL_CALLS]",), None, False, _parse_mistral, has_special_tokens=True)
