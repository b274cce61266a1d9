"""Command-line options made from the fields of `SamplingParams` and `EngineOptions`, so that neither can drift.

A field's docstring is the option's help. Only options that were given are handed on: defaults stay the record's own.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, fields
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import click

from cascade_llm.config import EngineOptions
from cascade_llm.errors import SamplingParamsError
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.server.options import ServerOptions

__all__ = [
    "SectionedCommand",
    "engine_options",
    "field_docs",
    "model_option",
    "record_options",
    "sampling_options",
    "server_options",
    "stacked",
    "take_engine",
    "take_record",
    "take_sampling",
    "take_server",
]

Command = TypeVar("Command", bound=Callable[..., Any])
Record = TypeVar("Record")

SAMPLING, ENGINE, RECORD, SERVER = "sampling_", "engine_", "record_", "server_"
"""What the names of a command's arguments start with, per record."""

ALIASES: Mapping[str, tuple[str, ...]] = {"quantization": ("--isq",)}
"""As other engines spell an option."""
ENGINE_FLAGS = {"seed": "--engine-seed"}
"""Engine options whose own name is a sampling option's too."""

METAVARS = {"logit_bias": "ID=BIAS", "stop": "TEXT", "stop_token_ids": "ID"}


SECTIONS = {
    RECORD: "Workload options",
    "": "Options",
    SERVER: "Server options",
    SAMPLING: "Sampling options",
    ENGINE: "Engine options",
}


class SectionedCommand(click.Command):
    """A command whose help lists its own options before those of the records."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one list per record."""
        records: dict[str, list[tuple[str, str]]] = {section: [] for section in SECTIONS}
        for parameter in self.get_params(ctx):
            name = str(parameter.name)
            section = next((prefix for prefix in SECTIONS if prefix and name.startswith(prefix)), "")
            if isinstance(parameter, click.Option) and (line := parameter.get_help_record(ctx)) is not None:
                records[section].append(line)
        for section, lines in records.items():
            if lines:
                with formatter.section(SECTIONS[section]):
                    formatter.write_dl(lines)


class FieldKind(NamedTuple):
    """How a field's annotation is written on a command line."""

    type: type
    is_list: bool


def stacked(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Decorators as one, in the order in which help lists them."""

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


model_option = click.option(
    "-m", "--model", default="smollm2", show_default=True, help="A folder, a .gguf file, ORG/NAME of a hub, or smollm2."
)


def sampling_options(command: Command) -> Command:
    """All of `SamplingParams`; collect them with `take_sampling`."""
    return _add(command, SamplingParams, SAMPLING, {}, {field.name for field in fields(SamplingParams)})


def engine_options(only: Collection[str] | None = None, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """All of `EngineOptions`, or some; collect them with `take_engine`."""
    names = {field.name for field in fields(EngineOptions)} if only is None else set(only)
    return lambda command: _add(command, EngineOptions, ENGINE, ENGINE_FLAGS, names - set(without))


def server_options(command: Command) -> Command:
    """All of `ServerOptions`; collect them with `take_server`."""
    return _add(command, ServerOptions, SERVER, {}, {field.name for field in fields(ServerOptions)})


def take_server(arguments: dict[str, Any]) -> ServerOptions:
    """Remove the server's options from a command's arguments and make the record of them."""
    return ServerOptions(**_take(arguments, SERVER))


def record_options(record: type) -> Callable[[Command], Command]:
    """All fields of a workload's record; collect them with `take_record`."""
    return lambda command: _add(command, record, RECORD, {}, {field.name for field in fields(record)})


def take_record(arguments: dict[str, Any], record: type[Record]) -> Record:
    """Remove a workload's options from a command's arguments and make the record of them."""
    return record(**_take(arguments, RECORD))


def take_sampling(arguments: dict[str, Any], **defaults: Any) -> SamplingParams:
    """Remove the sampling options from a command's arguments; `defaults` are for those that were not given."""
    given = _take(arguments, SAMPLING)
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(_read_bias, given["logit_bias"]))
    return SamplingParams(**(defaults | given))


def take_engine(arguments: dict[str, Any]) -> dict[str, Any]:
    """Remove the engine options that were given from a command's arguments, checked for range."""
    given = _take(arguments, ENGINE)
    if given.get("debug"):
        click.get_current_context().find_root().params["debug"] = True  # tracebacks as well
    EngineOptions(**given)
    return given


def field_docs(record: type) -> Mapping[str, str]:
    """The docstrings that stand below a class's fields."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(record))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for statement, after in pairwise(node.body):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                docs[name] = " ".join(doc.split())
    return docs


def _add(command: Command, record: type, prefix: str, flags: Mapping[str, str], names: Collection[str]) -> Command:
    hints, docs = get_type_hints(record), field_docs(record)
    for field in reversed(fields(record)):
        if field.name in names:
            flag = flags.get(field.name, "--" + field.name.replace("_", "-"))
            command = _option(field, flag, prefix, _kind(hints[field.name]), docs.get(field.name, ""))(command)
    return command


def _option(field: Field[Any], flag: str, prefix: str, kind: FieldKind, doc: str) -> Callable[[Command], Command]:
    argument = prefix + field.name
    default = "" if field.default is None else f"[default: {str(field.default).lower()}]"
    if kind.type is bool:
        off = flag.replace("--enable-", "--disable-") if "--enable-" in flag else flag.replace("--", "--no-")
        return click.option(f"{flag}/{off}", argument, default=None, help=f"{doc} {default}".strip())
    repeated = "May be given again." if kind.is_list else ""
    return click.option(
        flag,
        *ALIASES.get(field.name, ()),
        argument,
        type=kind.type,
        multiple=kind.is_list,
        default=None,
        metavar=METAVARS.get(field.name),
        help=" ".join(part for part in (doc, repeated, default) if part),
    )


def _kind(hint: Any) -> FieldKind:
    """Of "int | None" int, of "str | Sequence[str] | None" a list of str, of a mapping a list of "key=value"."""
    parts = [part for part in _alternatives(hint) if part is not NoneType]
    for part in parts:
        if get_origin(part) is not None:
            is_mapping = issubclass(get_origin(part), Mapping)
            return FieldKind(str if is_mapping else get_args(part)[0], is_list=True)
    (only,) = parts
    return FieldKind(only, is_list=False)


def _alternatives(hint: Any) -> Sequence[Any]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _take(arguments: dict[str, Any], prefix: str) -> dict[str, Any]:
    names = [name for name in arguments if name.startswith(prefix)]
    taken = {name.removeprefix(prefix): arguments.pop(name) for name in names}
    return {name: value for name, value in taken.items() if value not in (None, ())}


def _read_bias(text: str) -> tuple[int, float]:
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise SamplingParamsError(f"logit_bias has {text!r}: write TOKEN_ID=BIAS, such as 42=-100") from None
