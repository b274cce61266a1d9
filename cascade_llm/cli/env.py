"""`cascade-llm env`: what this machine has, for choosing options and for reporting bugs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import click
from rich.table import Table

from cascade_llm.cli.console import format_bytes, print_json, result_console
from cascade_llm.cli.kernels import DEFAULT_ARCH, attention_spec

__all__ = ["env"]


@click.command()
@click.option("-m", "--model", default="smollm2", show_default=True, help="The model whose GPU kernels are looked for.")
@click.option("--models", is_flag=True, help="Instead: which architectures and types of weights are served, and how.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(model: str, models: bool, as_json: bool) -> None:
    """Show versions, devices, attention backends and why one cannot be used, and which GPU kernels are built."""
    if models:
        _print_weight_support(as_json)
        return
    from cascade_llm.bench.machine import describe_machine
    from cascade_llm.engine.cost_setup import describe_calibrations

    kernels = _describe_kernels(model)
    machine = {**describe_machine(), "cost_model": describe_calibrations(), "kernels": kernels}
    if as_json:
        print_json(machine, indent=2)
    else:
        result_console().print(_table(machine))


def _print_weight_support(as_json: bool) -> None:
    """The types of weights, and then the architectures."""
    from cascade_llm.engine.weight_support import weight_support

    rows = list(weight_support())
    if as_json:
        print_json([asdict(row) for row in rows], indent=2)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("file", "type", "bits there", "here", "multiplied by"):
        table.add_column(column, no_wrap=True, justify="right" if column in ("bits there", "here") else "left")
    table.add_column("", overflow="fold")
    for row in rows:
        bits = (_bits(row.file_bits), _bits(row.memory_bits))
        table.add_row(row.container, row.type, *bits, row.held_as or "", row.note or "")
    result_console().print(table)
    result_console().print()
    result_console().print(_architecture_table())


def _architecture_table() -> Table:
    """Architectures, and the kinds of files that their weights may come in."""
    from cascade_llm.engine.architecture_support import architecture_support

    table = Table(box=None, pad_edge=False)
    for column in ("architecture", "class", "GGUF, as"):
        table.add_column(column, no_wrap=True)
    for row in architecture_support():
        table.add_row(row.name, row.classes, row.gguf or "not read")
    return table


def _bits(bits: float | None) -> str:
    return "" if bits is None else f"{bits:.3g}"


def _describe_kernels(model: str) -> dict[str, Any]:
    """Which FlashInfer modules the model would load here, or on Hopper where there is no GPU, and which are there."""
    import torch

    from cascade_llm.attention.flashinfer.kernels import device_arch, kernel_states

    arch = device_arch(torch.device("cuda")) if torch.cuda.is_available() else DEFAULT_ARCH
    states = kernel_states(attention_spec(model, "bfloat16"), arch)
    return {"model": model, "dtype": "bfloat16", "arch": arch, "modules": [asdict(state) for state in states]}


def _kernel_line(kernels: Mapping[str, Any]) -> str:
    missing = [module["purpose"] for module in kernels["modules"] if module["state"] == "missing"]
    there = len(kernels["modules"]) - len(missing)
    line = f"{there} of {len(kernels['modules'])} that {kernels['model']} needs on {kernels['arch']} are there"
    if not missing:
        return line
    return f"{line}; missing: {'; '.join(missing)} (cascade-llm kernels build {kernels['model']})"


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
    pages = cpu["auto_page_dtype"]
    table.add_row("kv_cache_dtype=auto", f"{pages['name']} on the CPU{_because(pages['reason'])}")
    table.add_row("memory", f"{format_bytes(memory['available'])} of {format_bytes(memory['total'])} available")
    table.add_row("CUDA devices", "\n".join(map(_device_line, machine["devices"])) or "none")
    table.add_section()
    for backend, reason in machine["backends"].items():
        table.add_row(f"backend {backend}", "usable" if reason is None else f"not usable: {reason}")
    table.add_row("GPU kernels", _kernel_line(machine["kernels"]))
    for line in machine["cost_model"]:
        table.add_row("cost model", line)
    for part in ("elementwise", "sampling"):
        table.add_row(part, f"{machine[part]['name']}{_because(machine[part]['reason'])}")
    table.add_row("native code", _native_line(machine["native_code"]))
    return table


def _native_line(native: Mapping[str, str | None]) -> str:
    """Which level serves, from where, and why no higher one does."""
    if native["level"] is None:
        return f"none{_because(native['reason'])}"
    return f"{native['level']}, {native['source']}{_because(native['reason'])}"


def _because(reason: str | None) -> str:
    return "" if reason is None else f" ({reason})"


def _device_line(device: Mapping[str, Any]) -> str:
    return (
        f"{device['name']}: {device['model']}, compute capability {device['compute_capability']}, "
        f"{format_bytes(device['memory_bytes'])}"
    )
