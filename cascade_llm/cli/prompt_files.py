"""Prompts from arguments, files and standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

from cascade_llm.cli.field_options import stacked
from cascade_llm.errors import PromptError
from cascade_llm.sampling_params import SamplingParams

__all__ = ["PromptInput", "read_file", "read_prompts", "take_template", "template_options", "with_system"]

CURE = 'write {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
SAMPLING_NAMES = frozenset(field.name for field in fields(SamplingParams))


@dataclass(frozen=True)
class PromptInput:
    """One prompt as it was given: a text, token ids, or a conversation."""

    where: str
    """For messages: "prompts.jsonl, line 3"."""
    content: str | list[int] | list[dict[str, Any]]

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation."""
        return isinstance(self.content, list) and bool(self.content) and isinstance(self.content[0], dict)


TEMPLATE_NAMES = ("chat_template", "chat_template_kwargs", "tools", "continue_final_message")


READABLE = click.Path(exists=True, dir_okay=False, path_type=Path)

template_options = stacked(
    click.option("--chat-template", type=READABLE, help="A file with another chat template than the model's."),
    click.option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="What else the chat template reads, such as '{\"enable_thinking\": false}'.",
    ),
    click.option("--tools", type=READABLE, help="A JSON file with a list of the functions that may be called."),
    click.option("--continue-final-message", is_flag=True, help="Go on with the last message of each conversation."),
)
"""What a chat template is told; collect it with `take_template`."""


def take_template(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove the template options from a command's arguments; returns those that were given, as `LLM.chat` takes them.

    Raises `PromptError` for what is no JSON.
    """
    given = {name: arguments.pop(name) for name in TEMPLATE_NAMES if name in arguments}
    given = {name: value for name, value in given.items() if value}
    if "chat_template" in given:
        given["chat_template"] = _read_text(given["chat_template"])
    if "tools" in given:
        given["tools"] = _json(f"--tools {given['tools']}", _read_text(given["tools"]), list)
    if "chat_template_kwargs" in given:
        given["chat_template_kwargs"] = _json("--chat-template-kwargs", given["chat_template_kwargs"], dict)
    return given


def _json(where: str, text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is no JSON ({error})") from None
    if not isinstance(value, kind):
        raise PromptError(f"{where} is a JSON {type(value).__name__}: give {'a list' if kind is list else 'an object'}")
    return value


def read_prompts(
    arguments: Sequence[str], file: Path | None, system_file: Path | None, *, as_chat: bool
) -> list[PromptInput]:
    """The prompts of a command line, all of one kind: arguments and file together, else standard input.

    `as_chat` makes texts the user's messages; the system file's text goes before each prompt.

    Raises `PromptError` that names the line at fault.
    """
    prompts = [PromptInput(f"argument {index}", text) for index, text in enumerate(arguments, start=1)]
    if file is not None:
        prompts.extend(read_file(file))
    elif not prompts:
        if sys.stdin.isatty():
            raise click.UsageError("no prompt: give one or more as arguments, by --file, or on standard input.")
        prompts.extend(_text_lines("standard input", sys.stdin))
    if not prompts:
        raise PromptError(f"{file or 'standard input'} has no prompts: write one per line")
    if as_chat:
        prompts = [_as_chat(prompt) for prompt in prompts]
    plain = next((prompt for prompt in prompts if not prompt.is_chat), None)
    chat = next((prompt for prompt in prompts if prompt.is_chat), None)
    if plain and chat:
        raise PromptError(
            f"{chat.where} is a conversation, {plain.where} a plain prompt: use --chat to make every prompt a "
            "conversation"
        )
    return prompts if system_file is None else with_system(prompts, _read_text(system_file))


def read_file(file: Path) -> list[PromptInput]:
    """One prompt per line that is not blank; a name that ends in .jsonl is read as JSON lines."""
    lines = _read_text(file).split("\n")
    if file.suffix != ".jsonl":
        return list(_text_lines(str(file), lines))
    numbered = ((f"{file}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip())
    return [PromptInput(where, _json_line(where, line)) for where, line in numbered]


def with_system(prompts: Sequence[PromptInput], system: str) -> list[PromptInput]:
    """The same prompts behind a shared text: as system message of conversations, else by plain concatenation."""
    shared = []
    for prompt in prompts:
        content: Any = prompt.content
        if prompt.is_chat:
            if content[0].get("role") == "system":
                raise PromptError(f"{prompt.where} has a system message of its own: leave out --system-file")
            content = [{"role": "system", "content": system}, *content]
        elif isinstance(content, str):
            content = system + content
        else:
            raise PromptError(f"{prompt.where} is token ids: --system-file goes with texts and conversations only")
        shared.append(replace(prompt, content=content))
    return shared


def _text_lines(name: str, lines: Iterable[str]) -> Iterable[PromptInput]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield PromptInput(f"{name}, line {number}", line.rstrip("\r\n"))


def _as_chat(prompt: PromptInput) -> PromptInput:
    if prompt.is_chat:
        return prompt
    if not isinstance(prompt.content, str):
        raise PromptError(f"{prompt.where} is token ids: --chat goes with texts only")
    return replace(prompt, content=[{"role": "user", "content": prompt.content}])


def _json_line(where: str, line: str) -> str | list[int] | list[dict[str, Any]]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where} is no JSON ({error}): {CURE}") from None
    if not isinstance(record, dict):
        raise PromptError(f"{where} is a JSON {type(record).__name__}, no object: {CURE}")
    if sampling := sorted(SAMPLING_NAMES & record.keys()):
        option = sampling[0].replace("_", "-")
        raise PromptError(f"{where} has {sampling[0]!r}: sampling is the same for all prompts, use --{option}")
    if ("prompt" in record) == ("messages" in record):
        both = "both a prompt and messages" if "prompt" in record else "neither a prompt nor messages"
        raise PromptError(f"{where} has {both}: {CURE}")
    if "messages" in record:
        return _messages(where, record["messages"])
    return _prompt(where, record["prompt"])


def _prompt(where: str, prompt: Any) -> str | list[int]:
    is_ids = isinstance(prompt, list) and all(isinstance(item, int) for item in prompt)
    if not isinstance(prompt, str) and not is_ids:
        raise PromptError(f'{where} has a prompt of type {type(prompt).__name__}: write "prompt": "..." or token ids')
    return prompt  # type: ignore[no-any-return]


def _messages(where: str, messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise PromptError(f'{where}: "messages" is no list of objects: {CURE}')
    return messages


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # an editor's mark at the beginning is no text
    except UnicodeDecodeError as error:
        raise PromptError(f"{file} is no UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8") from None
