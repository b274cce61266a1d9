"""`cascade-llm validate`: is what it computes right, on this machine and with this model?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cascade_llm.cli.console import print_json, result_console
from cascade_llm.cli.field_options import SectionedCommand, engine_options, take_engine
from cascade_llm.cli.validation_table import notes, validation_bar, validation_table, verdict
from cascade_llm.validation.options import OPTIONS

__all__ = ["validate"]


@click.command(cls=SectionedCommand)
@click.argument("model", required=False)
@click.option("--quick", is_flag=True, help="Fewer plans and shorter texts: under a minute with a small model.")
@click.option("--replay", type=click.Path(path_type=Path), help="Run the steps of a record_plans file again instead.")
@click.option("--max-steps", type=click.IntRange(min=1), help="With --replay: end after so many steps.")
@click.option("--allow-truncated", is_flag=True, help="With --replay: use what is there of a file that breaks off.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--seed", default=0, show_default=True, help="Of the generated plans and of random K and V.")
@engine_options(only=OPTIONS)
def validate(
    model: str | None,
    quick: bool,
    replay: Path | None,
    max_steps: int | None,
    allow_truncated: bool,
    as_json: bool,
    seed: int,
    **arguments: Any,
) -> None:
    """Compare attention, engine and MODEL with their references, and print figures and a verdict.

    Every attention backend that can run here is compared with float64 attention over generated plans; the engine with
    cascade attention on with itself without it, and with a warm cache; MODEL with transformers.

    With --replay the steps of a recording are run again: attention on random K and V, and where MODEL is given and
    token ids were recorded the engine, whose tokens are compared. Exit status 1 where anything differs by too much.
    """
    options = take_engine(arguments)
    if model is None and replay is None:
        raise click.UsageError("give a MODEL (a folder, a .gguf file, a hub id, or smollm2), or a file to --replay.")
    if replay is None and (max_steps is not None or allow_truncated):
        raise click.UsageError("--max-steps and --allow-truncated are for --replay.")
    with validation_bar() as progress:
        if replay is not None:
            from cascade_llm.validation.replay_file import replay as run_replay

            report = run_replay(
                replay,
                model,
                options,
                max_steps=max_steps,
                allow_truncated=allow_truncated,
                seed=seed,
                progress=progress,
            )
        else:
            from cascade_llm.validation.validate import FULL, QUICK
            from cascade_llm.validation.validate import validate as run_validation

            assert model is not None
            report = run_validation(model, options, effort=QUICK if quick else FULL, seed=seed, progress=progress)
    if as_json:
        print_json(report.as_dict(), indent=2)
    else:
        console = result_console()
        console.print(validation_table(report))
        for note in notes(report):
            console.print(f"- {note}", style="dim")
        console.print(verdict(report))
    if not report.passed:
        click.get_current_context().exit(1)
