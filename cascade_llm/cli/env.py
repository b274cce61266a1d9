"""`cascade-llm env`: what this machine has, for choosing options and for reporting bugs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from rich.table import Table

from cascade_llm.cli.console import format_bytes, print_json, result_console

__all__ = ["env"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json: bool) -> None:
    """Show versions, devices and attention backends, and why a backend cannot be used."""
    from cascade_llm.bench.machine import describe_machine
    from cascade_llm.engine.cost_setup import describe_calibrations

    machine = {**describe_machine(), "cost_model": describe_calibrations()}
    if as_json:
        print_json(machine, indent=2)
    else:
        result_console().print(_table(machine))


def _table(machine: Mapping[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for package, version in machine["versions"].items():
        table.add_row(package, version or "not installed")
    cpu, memory = machine["cpu"], machine["memory_bytes"]
    table.add_section()
    table.add_row("platform", machine["platform"])
    table.add_row("cpu", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['logical_cores']} logical cores usable")
    table.add_row("cpu features", f"{', '.join(cpu['features']) or 'none'} (torch uses {cpu['torch_capability']})")
    table.add_row("torch threads", str(cpu["torch_threads"]))
    table.add_row("dtype=auto", f"{cpu['auto_dtype']} on the CPU")
    table.add_row("memory", f"{format_bytes(memory['available'])} of {format_bytes(memory['total'])} available")
    table.add_row("CUDA devices", "\n".join(map(_device_line, machine["devices"])) or "none")
    table.add_section()
    for backend, reason in machine["backends"].items():
        table.add_row(f"backend {backend}", "usable" if reason is None else f"not usable: {reason}")
    for line in machine["cost_model"]:
        table.add_row("cost model", line)
    elementwise = machine["elementwise"]
    table.add_row("elementwise", f"{elementwise['name']}{_because(elementwise['reason'])}")
    return table


def _because(reason: str | None) -> str:
    return "" if reason is None else f" ({reason})"


def _device_line(device: Mapping[str, Any]) -> str:
    return (
        f"{device['name']}: {device['model']}, compute capability {device['compute_capability']}, "
        f"{format_bytes(device['memory_bytes'])}"
    )
