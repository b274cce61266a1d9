"""A group of commands with one command per workload: `cascade-llm bench throughput forest --groups 8`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from cascade_llm.bench.workloads import WORKLOADS, Workload
from cascade_llm.cli.field_options import SectionedCommand, record_options, take_record
from cascade_llm.cli.lazy_group import LazyGroup

__all__ = ["WorkloadGroup"]


class WorkloadGroup(LazyGroup):
    """Makes its commands from the records of workloads: their fields are options, their docstrings the help."""

    def __init__(
        self,
        *args: Any,
        run: Callable[..., None],
        options: Callable[[Any], Any],
        workloads: Mapping[str, type[Workload]] = WORKLOADS,
        **kwargs: Any,
    ) -> None:
        """`run` is called with a workload and the command's arguments; `options` adds options to each command."""
        super().__init__(*args, places=dict.fromkeys(workloads, ""), **kwargs)
        self._run, self._add_options, self._workloads = run, options, workloads

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a workload; None for an unknown one."""
        record = self._workloads.get(cmd_name)
        return None if record is None else self._command(cmd_name, record)

    def _command(self, name: str, record: type[Workload]) -> click.Command:
        def callback(**arguments: Any) -> None:
            workload = take_record(arguments, record)
            self._run(workload, **arguments)

        decorated = record_options(record)(self._add_options(callback))
        return click.command(name, cls=SectionedCommand, help=record.__doc__)(decorated)
