"""`cascade-llm chat`: a conversation in the terminal, or through a pipe.

The history is kept as token ids, the model's own among them, so that every turn finds all earlier ones in the prefix
cache and computes what is new.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.console import error_console, open_llm
from cascade_llm.cli.field_options import (
    SectionedCommand,
    engine_options,
    model_option,
    sampling_options,
    take_engine,
    take_sampling,
)
from cascade_llm.cli.prompt_files import take_template, template_options
from cascade_llm.cli.remote import RemoteModel, asked_model, remote_options, take_remote
from cascade_llm.errors import GenerationError, PromptError, RequestError, SamplingParamsError, nearest_name_hint
from cascade_llm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from cascade_llm.engine.tokenizer import Tokenizer
    from cascade_llm.llm import LLM
    from cascade_llm.outputs import RequestOutput

__all__ = ["Conversation", "chat"]

PROMPT = "> "
COMMANDS = {"/reset": "forget the conversation", "/exit": "leave (or Ctrl-D)", "/help": "show these commands"}


@click.command(cls=SectionedCommand)
@model_option
@remote_options
@click.option(
    "--system-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The system message.",
)
@template_options
@click.option("-q", "--quiet", is_flag=True, help="Print answers only.")
@sampling_options
@engine_options()
def chat(model: str, system_file: Path | None, quiet: bool, **arguments: Any) -> None:
    """Talk to a model; each line is a message. /reset forgets, /exit or Ctrl-D leaves, Ctrl-C stops an answer."""
    params, options, template = take_sampling(arguments), take_engine(arguments), take_template(arguments)
    if template.pop("continue_final_message", False):
        raise PromptError("--continue-final-message goes with `generate`: here each line begins a message of its own")
    if params.n != 1:
        raise SamplingParamsError(f"n is {params.n}: a conversation goes on from one answer, leave it at 1")
    server = take_remote(arguments, options)
    system = system_file.read_text(encoding="utf-8-sig") if system_file else None
    if server is not None:
        _chat_with(RemoteModel(server, asked_model(), params, template), History(system), quiet=quiet)
        return
    with open_llm(model, options) as llm:
        if llm.tokenizer is None:
            raise PromptError(f"{model} has no tokenizer: a conversation needs one, copy its tokenizer.json beside it")
        conversation = Conversation(llm.tokenizer, system, template, params.split_special_tokens)
        for line in _messages(llm.model_name, conversation, quiet=quiet):
            _take_turn(llm, conversation, line, params, quiet=quiet)


def _chat_with(remote: RemoteModel, history: History, *, quiet: bool) -> None:
    """The same with a server, which gets the messages so far at every turn."""
    for line in _messages(remote.name, history, quiet=quiet):
        messages, texts = [*history.messages, {"role": "user", "content": line}], list[str]()
        try:
            with _stoppable() as stopped, closing(remote.stream_chat(messages)) as stream:
                for delta in stream:
                    texts.append(delta.text)
                    click.echo(delta.text, nl=False)
                    sys.stdout.flush()
                    if stopped:
                        break
        except GenerationError as error:
            _tell(f"{error} (/reset starts anew)", style="red")
            continue
        click.echo()
        history.messages = [*messages, {"role": "assistant", "content": "".join(texts)}]


def _messages(name: str, history: History, *, quiet: bool) -> Iterator[str]:
    """What the user writes to the model of this name; commands are carried out."""
    if not quiet and sys.stdin.isatty():
        _tell(f"{name}: write a message, or {', '.join(COMMANDS)}")
    for line in _lines():
        if line == "/exit":
            return
        if line.startswith("/"):
            _run_command(line, history)
        else:
            yield line


class History:
    """The messages of a conversation."""

    def __init__(self, system: str | None) -> None:
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._start)


class Conversation(History):
    """Messages and the token ids that spell them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        system: str | None,
        template: Mapping[str, Any] | None = None,
        split_special_tokens: bool = False,
    ) -> None:
        """`template`: what its chat template is told, as `LLM.chat` takes it."""
        self._tokenizer, self._splits = tokenizer, split_special_tokens
        template = dict(template or {})
        self._template = {**template.pop("chat_template_kwargs", {}), **template}
        super().__init__(system)

    def reset(self) -> None:
        """Forget everything but the system message."""
        super().reset()
        self._history_ids: list[int] = []

    def prompt_ids(self, text: str) -> list[int]:
        """The whole conversation with a new message at its end, starting with the ids of what was said so far."""
        messages = [*self.messages, {"role": "user", "content": text}]
        if self._splits:
            return self._tokenizer.encode_chat(messages, split_special_tokens=True, **self._template)
        return self._tokenizer.encode_continuation(self._history_ids, messages, **self._template)

    def add_turn(self, text: str, output: RequestOutput) -> None:
        """Keep a message and its answer, as far as it came."""
        answer = output.outputs[0]
        # text is held back while it may become a stop string; what was aborted is read from its ids
        content = self._tokenizer.decode(answer.token_ids) if answer.finish_reason == "abort" else answer.text
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": content}]
        self._history_ids = [*output.prompt_token_ids, *answer.token_ids]


def _lines() -> Iterator[str]:
    """What the user writes, until the end of input or Ctrl-C."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        import readline  # noqa: F401  (input() edits lines with it)
    while True:
        try:
            line = input(PROMPT) if is_terminal else next(sys.stdin)
        except (EOFError, StopIteration, KeyboardInterrupt):
            if is_terminal:
                click.echo()
            return
        if line.strip():
            yield line.strip()


def _run_command(line: str, conversation: History) -> None:
    if line == "/reset":
        conversation.reset()
        _tell("the conversation starts anew")
    elif line == "/help":
        for name, meaning in COMMANDS.items():
            _tell(f"{name}  {meaning}")
    else:
        _tell(f"unknown command {line!r}: {nearest_name_hint(line, COMMANDS)}")


def _take_turn(llm: LLM, conversation: Conversation, text: str, params: SamplingParams, *, quiet: bool) -> None:
    """Print the answer as it comes. A message that cannot be served is left out of the conversation."""
    start_s = time.perf_counter()
    try:
        with _stoppable() as stopped, llm.stream(conversation.prompt_ids(text), params) as stream:
            for delta in stream:
                click.echo(delta.text, nl=False)
                sys.stdout.flush()
                if stopped:
                    break
    except RequestError as error:
        _tell(f"{error} (/reset starts anew)", style="red")
        return
    click.echo()
    conversation.add_turn(text, stream.output)
    if not quiet:
        _tell(_turn_summary(stream.output, time.perf_counter() - start_s, stopped=bool(stopped)))


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Collects Ctrl-C instead of raising it, which would fail the step that is under way; a second one raises."""
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _turn_summary(output: RequestOutput, elapsed_s: float, *, stopped: bool) -> str:
    num_generated = len(output.outputs[0].token_ids)
    num_new = len(output.prompt_token_ids) - output.num_cached_tokens
    return (
        f"[{output.num_cached_tokens} tokens cached, {num_new} new, {num_generated} generated"
        f"{', stopped' if stopped else ''}; {num_generated / elapsed_s:.1f} tok/s]"
    )


def _tell(text: str, style: str = "dim") -> None:
    error_console().print(text, style=style, soft_wrap=True)
