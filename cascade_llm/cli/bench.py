"""`cascade-llm bench`: measurements on the user's own machine."""

from __future__ import annotations

import click

from cascade_llm.cli.lazy_group import LazyGroup

__all__ = ["bench"]

PLACES = {
    "throughput": "cascade_llm.cli.bench_throughput:throughput",
    "latency": "cascade_llm.cli.bench_latency:latency",
    "attention": "cascade_llm.cli.bench_attention:attention",
    "serve": "cascade_llm.cli.bench_serve:serve",
    "calibrate": "cascade_llm.cli.bench_calibrate:calibrate",
}


@click.group(cls=LazyGroup, places=PLACES, invoke_without_command=True)
@click.option("--calibrate", "calibrates", is_flag=True, help="The same as the command calibrate.")
@click.pass_context
def bench(ctx: click.Context, calibrates: bool) -> None:
    """Measure on this machine."""
    if ctx.invoked_subcommand is not None:
        if calibrates:
            raise click.UsageError("--calibrate takes no other command: write 'cascade-llm bench calibrate'")
    elif calibrates:
        command = bench.get_command(ctx, "calibrate")
        assert command is not None
        with command.make_context("calibrate", [], parent=ctx) as own:
            command.invoke(own)
    else:
        click.echo(ctx.get_help())
        ctx.exit(2)
