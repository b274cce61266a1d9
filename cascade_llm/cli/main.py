"""The command `cascade-llm`: its commands, and what becomes of their errors.

Exit status: 0; 1 for an error, printed as one line; 2 for a wrong command line; 130 after Ctrl-C. A traceback is shown
with `--debug` only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

import click

from cascade_llm import __version__
from cascade_llm.cli.lazy_group import LazyGroup
from cascade_llm.errors import CascadeError

__all__ = ["RootGroup", "cli", "main", "run_command"]

INTERRUPTED = 130
"""What a shell reports for a process that SIGINT ended."""

COMMANDS = {
    "generate": "cascade_llm.cli.generate:generate",
    "chat": "cascade_llm.cli.chat:chat",
    "batch": "cascade_llm.cli.batch:batch",
    "serve": "cascade_llm.cli.serve:serve",
    "plan": "cascade_llm.cli.plan:plan",
    "bench": "cascade_llm.cli.bench:bench",
    "validate": "cascade_llm.cli.validate:validate",
    "demo": "cascade_llm.cli.demo:demo",
    "pull": "cascade_llm.cli.pull:pull",
    "models": "cascade_llm.cli.models:models",
    "env": "cascade_llm.cli.env:env",
    "kernels": "cascade_llm.cli.kernels:kernels",
}

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class RootGroup(LazyGroup):
    """Turns errors into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(_one_line(error)) from error


def _one_line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    if isinstance(error, CascadeError):
        return words
    if isinstance(error, OSError | UnicodeError):
        return f"{type(error).__name__}: {words}"
    return (
        f"{type(error).__name__}: {words}: this was not foreseen, cascade-llm --debug COMMAND shows where it happened"
    )


@click.group(cls=RootGroup, places=COMMANDS, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="cascade-llm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """LLM inference that attends shared prefixes once per step for the whole batch."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own); returns the exit status."""
    return run_command(cli, "cascade-llm", args)


def run_command(command: click.Command, name: str, args: Sequence[str] | None = None) -> int:
    """Run a command line of a `RootGroup`; returns the exit status."""
    if not _open_streams():
        click.echo("Error: standard output is closed", err=True)
        return 1
    try:
        status = command.main(args, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
    except click.Abort:
        _tell("Interrupted.")
        return INTERRUPTED
    except click.ClickException as error:
        with suppress(OSError):
            error.show()
        _drop_output()
        return error.exit_code
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # whoever read our output has what it wanted
            _tell(f"Error: standard output cannot be written: {error.strerror}")
        _drop_output()
        return 1
    return status if isinstance(status, int) else 0


def _open_streams() -> bool:
    """Make the three streams usable, whatever the caller's shell did to them; False where there is no output."""
    has_output = sys.stdout is not None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # text that the terminal's encoding lacks is escaped
            stream.reconfigure(errors="backslashreplace")
    return has_output


def _tell(line: str) -> None:
    with suppress(OSError):
        click.echo(line, err=True)


def _drop_output() -> None:
    """What could not be written is forgotten: the flush at exit would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
