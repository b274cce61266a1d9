"""The options that name another engine, and how it is opened."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cascade_llm.cli.console import error_console
from cascade_llm.cli.field_options import stacked

if TYPE_CHECKING:
    from cascade_llm.bench.load import Load
    from cascade_llm.bench.setup import BenchModel
    from cascade_llm.bench.sides import OpenSide

__all__ = ["open_peer", "peer_options"]

peer_options = stacked(
    click.option(
        "--against",
        help="Another engine to take turns with: vllm, transformers, llama.cpp, or another checkout of this repository "
        "by its folder.",
    ),
    click.option("--peer-python", type=click.Path(path_type=Path), help="The interpreter that has it."),
    click.option("--install-peer", is_flag=True, help="Make an environment for it in the user's cache folder."),
)
"""Another engine to compare with."""


def open_peer(
    model: BenchModel,
    *loads: Load,
    against: str | None,
    peer_python: Path | None,
    install_peer: bool,
    online: bool = False,
) -> list[OpenSide]:
    """How the engine of that name is opened for these loads; nothing where none is wanted.

    An installation says what it does. `online`: it is started as it serves requests that come one by one.
    """
    if against is None:
        if peer_python is not None or install_peer:
            raise click.UsageError("--peer-python and --install-peer are for --against: name the engine.")
        return []
    from benchmarks.peer_side import PeerSide, peer_for

    def say(what: str) -> None:
        error_console().print(f"{against}: {what}", style="dim")

    peer = peer_for(against, model, python=peer_python, install=install_peer, on_install=say)
    return [partial(PeerSide, peer, model, *loads, online=online)]
