"""`cascade-llm serve`: a server that speaks OpenAI's protocol."""

from __future__ import annotations

import logging
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import click

from cascade_llm.cli.console import error_console
from cascade_llm.cli.extras import require_serve_extra
from cascade_llm.cli.field_options import (
    SectionedCommand,
    engine_options,
    server_options,
    stacked,
    take_engine,
    take_server,
)
from cascade_llm.errors import ConfigError

__all__ = ["serve"]

LOG_LEVELS = ("debug", "info", "warning", "error")


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Take the values of a file as defaults: what the command line says stands."""
    if path is None:
        return
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8")) or {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} must map names of options to values")
    names = {_plain(flag): p.name for p in context.command.params for flag in (*p.opts, *p.secondary_opts) if p.name}
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(_plain(str(key)))
        if name is None or name in ("config", "print_config", "print_dashboard"):
            from cascade_llm.errors import nearest_name_hint

            raise ConfigError(f"--config {path} has the unknown option {key!r}: {nearest_name_hint(str(key), names)}")
        defaults[name] = value
    context.default_map = defaults


def _print_dashboard(context: click.Context, parameter: click.Parameter, is_asked: bool) -> None:
    if is_asked:
        click.echo((files("cascade_llm.server") / "grafana.json").read_text("utf-8"), nl=False)
        context.exit()


def _plain(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


own_options = stacked(
    click.argument("model", default="smollm2"),
    click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        callback=_read_config,
        is_eager=True,
        expose_value=False,
        help="A YAML file with options by their names; the command line goes before it.",
    ),
    click.option("--print-config", is_flag=True, help="Print the options as such a file, and end."),
    click.option(
        "--print-dashboard",
        is_flag=True,
        callback=_print_dashboard,
        is_eager=True,
        expose_value=False,
        help="Print a Grafana dashboard of /metrics as JSON, and end.",
    ),
    click.option(
        "--log-level",
        type=click.Choice(LOG_LEVELS),
        default="info",
        show_default=True,
        help="Of lines on standard error.",
    ),
)


@click.command(cls=SectionedCommand)
@own_options
@server_options
@engine_options()
def serve(model: str, print_config: bool, log_level: str, **arguments: Any) -> None:
    """Serve MODEL over HTTP, as OpenAI's clients ask: a folder, a .gguf file, ORG/NAME of a hub, or smollm2."""
    options, engine = take_server(dict(arguments)), take_engine(dict(arguments))
    if print_config:
        _print_config({"model": model, "log_level": log_level, **arguments})
        return
    require_serve_extra("serve")
    logging.basicConfig(level=log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("uvicorn").setLevel("WARNING")
    with error_console().status("starting"):
        from cascade_llm.server.run import serve as run
    run(model, engine, options, lambda url: click.echo(f"listening on {url}", err=True))


def _print_config(arguments: dict[str, Any]) -> None:
    import yaml

    given = {
        key.removeprefix("server_").removeprefix("engine_"): list(value) if isinstance(value, tuple) else value
        for key, value in arguments.items()
        if value not in (None, ())
    }
    if "engine_seed" in arguments and given.pop("seed", None) is not None:
        given["engine_seed"] = arguments["engine_seed"]
    click.echo(yaml.safe_dump(given, sort_keys=False), nl=False)
