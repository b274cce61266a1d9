"""`cascade-llm kernels`: compile FlashInfer's kernels ahead of time, and see which are there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from cascade_llm.cli.console import error_console, format_bytes, print_json, result_console

if TYPE_CHECKING:
    from cascade_llm.attention.backend import AttentionSpec
    from cascade_llm.attention.flashinfer.kernels import BuiltKernel

__all__ = ["DEFAULT_ARCH", "attention_spec", "kernels"]

DEFAULT_ARCH = "9.0a"


@click.group()
def kernels() -> None:
    """Compile FlashInfer's GPU kernels ahead of time; needs nvcc and no GPU."""


@kernels.command()
@click.argument("model")
@click.option("--arch", default=DEFAULT_ARCH, show_default=True, help="GPU architecture; 9.0a is Hopper.")
@click.option("--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16"]))
@click.option("--kv-cache-dtype", default="auto", show_default=True, type=click.Choice(["auto", "fp8_e4m3"]))
@click.option("--output", type=click.Path(path_type=Path), help="Folder; default: where the engine looks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def build(model: str, arch: str, dtype: str, kv_cache_dtype: str, output: Path | None, as_json: bool) -> None:
    """Compile the kernels that MODEL needs (a folder with a config.json is enough).

    Takes minutes, an nvcc, and of PyPI nvidia-cublas and nvidia-curand where the CUDA toolkit lacks their headers.
    """
    from cascade_llm.attention.flashinfer.kernels import build_kernels, kernel_folder

    folder = output or kernel_folder(arch)
    console = error_console()
    with console.status("reading the model") as status:

        def show(purpose: str, done: int, total: int) -> None:
            status.update(f"compiling {done + 1} of {total}: {purpose}")

        spec = attention_spec(model, dtype, kv_cache_dtype)
        built = build_kernels(spec, arch, folder, on_kernel=show)
    _print(built, folder, as_json)
    failed = [kernel for kernel in built if kernel.error]
    for kernel in failed:
        console.print(f"{kernel.name} ({kernel.purpose}) failed:\n{kernel.error}")
    if failed:
        raise click.exceptions.Exit(1)


@kernels.command(name="list")
@click.option("--arch", default=DEFAULT_ARCH, show_default=True, help="GPU architecture.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder; default: where the engine looks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_command(arch: str, output: Path | None, as_json: bool) -> None:
    """Show the kernels that were compiled."""
    from cascade_llm.attention.flashinfer.kernels import kernel_folder, list_kernels

    folder = output or kernel_folder(arch)
    _print(list_kernels(folder), folder, as_json)


def attention_spec(model: str, dtype: str, kv_cache_dtype: str = "auto") -> AttentionSpec:
    """The shape of a model's attention, read from its configuration alone."""
    import torch

    from cascade_llm.attention.backend import AttentionSpec
    from cascade_llm.device.devices import KV_DTYPES
    from cascade_llm.loader.resolve import open_checkpoint
    from cascade_llm.models.architectures import model_config_from_hf

    config = model_config_from_hf(open_checkpoint(model, load_format="dummy").hf_config())
    computed = getattr(torch, dtype)
    kv_dtype = KV_DTYPES.get(kv_cache_dtype, computed)
    return AttentionSpec.for_model(config, computed, torch.device("cpu"), kv_dtype)


def _print(built: list[BuiltKernel], folder: Path, as_json: bool) -> None:
    if as_json:
        print_json({"folder": str(folder), "kernels": [asdict(kernel) for kernel in built]}, indent=2)
        return
    table = Table(box=None, pad_edge=False, title=str(folder), title_justify="left")
    table.add_column("kernel", overflow="fold")
    table.add_column("for", overflow="fold")
    table.add_column("size", no_wrap=True)
    table.add_column("seconds", no_wrap=True)
    for kernel in built:
        size = "failed" if kernel.error else format_bytes(kernel.num_bytes)
        table.add_row(kernel.name, kernel.purpose, size, f"{kernel.seconds:.0f}")
    result_console().print(table if built else f"no kernels in {folder}")
