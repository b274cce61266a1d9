"""What the arguments of a call mean: one prompt or many, one value for all prompts or one for each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from cascade_llm.engine.input_processor import Prompt
from cascade_llm.errors import ConfigError, PromptError, RequestError, SamplingParamsError
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.sessions import SessionUse

__all__ = [
    "CacheSalts",
    "Messages",
    "SessionIds",
    "SharingArguments",
    "as_conversations",
    "as_many",
    "one_per_prompt",
    "template_arguments",
]

Messages = Sequence[Mapping[str, Any]]
SessionIds = str | Sequence[str | None] | None
"""One for the only prompt, or one per prompt."""
CacheSalts = str | Sequence[str | None] | None
"""One for all prompts, or one per prompt."""
Item = TypeVar("Item")

SESSION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True)
class SharingArguments:
    """With whom the prompts of a call share pages, and of which conversations they are turns."""

    session_id: SessionIds = None
    fork_of: SessionIds = None
    cache_salt: CacheSalts = None

    def read(
        self, params: Sequence[SamplingParams], *, has_prefix_cache: bool
    ) -> Sequence[tuple[SessionUse | None, bytes]]:
        """Session and salt of each prompt. Raises `RequestError` for what is none, or cannot be a turn."""
        sessions = _session_uses(self.session_id, self.fork_of, params, has_prefix_cache)
        return list(zip(sessions, _salts(self.cache_salt, len(params)), strict=True))


def _salts(given: CacheSalts, count: int) -> Sequence[bytes]:
    salts: Sequence[str | None] = [given] * count if given is None or isinstance(given, str) else list(given)
    if len(salts) != count:
        raise RequestError(f"cache_salt has {len(salts)} entries for {count} prompts: give one for all, or one each")
    for salt in salts:
        if salt is not None and not (isinstance(salt, str) and salt):
            raise RequestError(f"cache_salt is {salt!r:.80}: it must be a text, and no empty one")
    return [(salt or "").encode("utf-8", "surrogatepass") for salt in salts]


def _session_uses(
    session_id: SessionIds, fork_of: SessionIds, params: Sequence[SamplingParams], has_prefix_cache: bool
) -> list[SessionUse | None]:
    names, sources = _names("session_id", session_id, len(params)), _names("fork_of", fork_of, len(params))
    named = [name for name in names if name is not None]
    if len(set(named)) < len(named):
        raise RequestError("session_id names a session twice: a turn waits for the end of the one before")
    uses: list[SessionUse | None] = []
    for name, source, sampling in zip(names, sources, params, strict=True):
        if name is None and source is not None:
            raise RequestError(f"fork_of {source!r:.80} needs the branch's own session_id beside it")
        if name is not None and sampling.n != 1:
            raise RequestError(f"session {name!r:.80} goes on with one answer: n is {sampling.n}, set it to 1")
        if name is not None and not has_prefix_cache:
            raise RequestError("a session holds cached prefixes: set enable_prefix_caching=True, or leave it out")
        uses.append(None if name is None else SessionUse(session_id=name, fork_of=source))
    return uses


def _names(what: str, given: SessionIds, count: int) -> Sequence[str | None]:
    if isinstance(given, str) and count != 1:
        raise RequestError(f"{what} is one name for {count} prompts: give a list with one per prompt")
    names: Sequence[str | None] = [given] * count if given is None or isinstance(given, str) else list(given)
    if len(names) != count:
        raise RequestError(f"{what} has {len(names)} entries for {count} prompts: give one per prompt")
    for name in names:
        if name is not None and not (isinstance(name, str) and SESSION_ID.fullmatch(name)):
            raise RequestError(f"{what} is {name!r:.80}: it must be 1 to 128 letters, digits, '.', '_', ':' or '-'")
    return names


def template_arguments(
    tools: Sequence[Mapping[str, Any]] | None,
    chat_template: str | None,
    kwargs: Mapping[str, Any] | None,
    add_generation_prompt: bool,
    continue_final_message: bool,
) -> dict[str, Any]:
    """What `chat` and `stream` hand to the template. Raises `RequestError` for what is none of it."""
    if tools is not None and (
        not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise RequestError("tools must be a list of JSON schemas, each a mapping")
    if not isinstance(kwargs, Mapping | None) or not all(isinstance(name, str) for name in kwargs or ()):
        raise RequestError(f"chat_template_kwargs is a {type(kwargs).__name__}: it must map names to values")
    arguments: dict[str, Any] = {
        "chat_template": chat_template,
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        **({} if tools is None else {"tools": tools}),
    }
    if taken := sorted({"messages", "tools", *arguments} & set(kwargs or ())):
        raise RequestError(f"chat_template_kwargs has {taken[0]!r}: it is an argument of its own")
    return arguments | dict(kwargs or {})


def as_many(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """Prompts, of one or many. Raises `PromptError` for what is neither."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray | memoryview):
        raise PromptError(
            f"prompts is a {type(prompts).__name__}: give a text, a list of token ids, or a list of these"
        )
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast(Sequence[int], prompts)]
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
            raise PromptError(f"prompt {index} is a {type(prompt).__name__}: give a text or a list of token ids")
    return cast(Sequence[Prompt], prompts)


def as_conversations(messages: object) -> Sequence[Messages]:
    """Conversations, of one or many. Raises `PromptError` for what is neither."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise PromptError('messages must be a list of {"role": ..., "content": ...}, or a list of such lists')
    if isinstance(messages[0], Mapping):
        return [cast(Messages, messages)]
    return cast(Sequence[Messages], messages)


def one_per_prompt(name: str, given: Item | Sequence[Item], kind: type[Item], count: int) -> Sequence[Item]:
    """`given` once for every prompt, or as it is where it is one per prompt.

    Raises `ConfigError`, or `SamplingParamsError` for parameters.
    """
    if isinstance(given, kind):
        return [given] * count
    wrong = SamplingParamsError if kind is SamplingParams else ConfigError
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(item, kind) for item in given):
        raise wrong(f"{name} must be one {kind.__name__}, or a list with one per prompt")
    if len(given) != count:
        raise wrong(f"{name} has {len(given)} entries for {count} prompts: give one for all, or one per prompt")
    return given
