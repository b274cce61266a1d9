"""The command `cascade-llm`: its commands, and what becomes of their errors.

Exit status: 0; 1 for an error of cascade-llm's own, printed as one line; 2 for a wrong command line; 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from cascade_llm import __version__
from cascade_llm.cli.lazy_group import LazyGroup
from cascade_llm.errors import CascadeError

__all__ = ["cli", "main"]

INTERRUPTED = 130
"""What a shell reports for a process that SIGINT ended."""

COMMANDS = {
    "generate": "cascade_llm.cli.generate:generate",
    "chat": "cascade_llm.cli.chat:chat",
    "plan": "cascade_llm.cli.plan:plan",
    "bench": "cascade_llm.cli.bench:bench",
    "validate": "cascade_llm.cli.validate:validate",
    "demo": "cascade_llm.cli.demo:demo",
    "env": "cascade_llm.cli.env:env",
    "kernels": "cascade_llm.cli.kernels:kernels",
}

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class RootGroup(LazyGroup):
    """Turns cascade-llm's own errors into one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except CascadeError as error:
            if ctx.params["debug"]:
                raise
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=RootGroup, places=COMMANDS, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="cascade-llm")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """LLM inference that attends shared prefixes once per step for the whole batch."""


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own); returns the exit status."""
    try:
        status = cli.main(args, prog_name="cascade-llm", standalone_mode=False)
        sys.stdout.flush()
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except BrokenPipeError:  # whoever read our output has what it wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the flush at exit fails again
        return 1
    return status if isinstance(status, int) else 0
