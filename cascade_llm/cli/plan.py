"""`cascade-llm plan`: what a file of prompts shares, and what the planner makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cascade_llm.cli.console import result_console
from cascade_llm.cli.field_options import SectionedCommand, engine_options, model_option, take_engine
from cascade_llm.cli.generate import prompt_options
from cascade_llm.cli.output_files import Outputs, output_options
from cascade_llm.cli.prompt_files import read_prompts
from cascade_llm.config import EngineOptions

__all__ = ["plan"]

PLANNING = (
    "dtype",
    "device",
    "num_threads",
    "attention_backend",
    "kv_cache_dtype",
    "page_size",
    "max_model_len",
    "enable_cascade_attention",
    "cascade_shared_prefix_len",
    "cascade_max_levels",
)
"""The engine options that a plan depends on, itself or through the cost model that is measured for them."""


@click.command(cls=SectionedCommand)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@prompt_options
@model_option
@click.option(
    "--costs",
    help="The device whose cost model decides (cpu, a100, h100, h200); default: the engine's choice on this machine.",
)
@output_options
@engine_options(only=PLANNING)
def plan(
    *,
    out: Outputs,
    file: Path,
    system_file: Path | None,
    as_chat: bool,
    model: str,
    costs: str | None,
    **arguments: Any,
) -> None:
    """Draw the tree of prefixes that the prompts of FILE share, and the levels that they get in a decode step.

    Times are the cost model's prediction for all layers. No weights are read and nothing is generated. FILE is as for
    `generate --file`.
    """
    options = EngineOptions(**take_engine(arguments))
    out.check()
    inputs = read_prompts((), file, system_file, as_chat=as_chat)
    from cascade_llm.bench.plan_tree import plan_prompts
    from cascade_llm.cli.plan_drawing import draw_tree, tree_chart

    tree = plan_prompts(model, [item.content for item in inputs], options, costs=costs)
    caption = f"{model}; cost model: {tree.costs}"
    out.deliver(
        tree.as_dict(), lambda: result_console().print(draw_tree(tree)), lambda: [tree_chart(tree)], caption=caption
    )
