"""`cascade-llm pull`: fetch a model from a hub into its cache, so that it starts without a network later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from cascade_llm.cli.console import error_console, format_bytes, print_json

if TYPE_CHECKING:
    from cascade_llm.loader.hub import RepositoryFile

__all__ = ["pull"]

CHECKED_BYTES = 100_000_000
"""From here on it is asked whether the model is implemented before its weights are fetched: asking takes a second."""
SOURCES = ["huggingface", "modelscope"]


@click.command()
@click.argument("model")
@click.option("--revision", help="A branch, tag or commit; also as MODEL@REVISION.  [default: the main branch]")
@click.option("--source", type=click.Choice(SOURCES), help="The hub; also by hf:// or ms:// before MODEL.")
@click.option("--include", multiple=True, metavar="GLOB", help="Of the files that are read, these only. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def pull(model: str, revision: str | None, source: str | None, include: tuple[str, ...], as_json: bool) -> None:
    """Fetch MODEL from a hub: ORG/NAME, ORG/NAME@REVISION, or ORG/NAME:FILE.gguf.

    Only what is read is fetched: safetensors or GGUF, configuration, tokenizer, chat templates; never a format that
    runs code. Sizes are told first, and a disk that is too small is refused. Files that are in the cache are not
    fetched again. Prints the folder.
    """
    from cascade_llm.errors import ModelNotFoundError
    from cascade_llm.loader.hub import fetch
    from cascade_llm.loader.hub_name import parse_hub_name
    from cascade_llm.loader.hubs import open_hub

    name = parse_hub_name(model, revision=revision, hub=source)
    if name is None:
        raise ModelNotFoundError(f"{model!r} is no model of a hub: write ORG/NAME, ORG/NAME@REVISION or ORG/NAME:FILE")
    hub = open_hub(name.hub)
    planned: list[RepositoryFile] = []

    def on_plan(files: Sequence[RepositoryFile]) -> None:
        planned.extend(files)
        _tell(f"{name} on {hub.title}", files)
        if name.file is None and sum(file.num_bytes for file in files if not file.is_cached) >= CHECKED_BYTES:
            from cascade_llm.engine.cached_models import reason_against

            if reason := reason_against(hub, name, files):
                error_console().print(f"Warning: {name} will not be served: {reason}", soft_wrap=True)

    path = fetch(hub, name, include=include, on_plan=on_plan)
    if not planned:
        error_console().print(f"{hub.title} cannot be asked: this is what its cache holds")
    if as_json:
        files = [{"name": file.name, "num_bytes": file.num_bytes, "was_cached": file.is_cached} for file in planned]
        print_json({"model": str(name), "path": str(path), "files": files}, indent=2)
    else:
        click.echo(path)


def _tell(what: str, files: Sequence[RepositoryFile]) -> None:
    """What will be fetched, file by file."""
    console = error_console()
    total = sum(file.num_bytes for file in files)
    missing = [file for file in files if not file.is_cached]
    rest = sum(file.num_bytes for file in missing)
    to_fetch = f"{len(missing)} of them, {format_bytes(rest)}, to fetch" if missing else "all in the cache"
    console.print(f"{what}: {len(files)} files, {format_bytes(total)}; {to_fetch}")
    for file in missing:
        console.print(f"  {file.name}  {format_bytes(file.num_bytes)}", soft_wrap=True)
