"""`python -m benchmarks planning`: how long planning takes and how it grows, and what a large prefix cache costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich.table import Table

from cascade_llm.cli.console import format_bytes, result_console, run_bar
from cascade_llm.cli.output_files import Outputs, output_options

if TYPE_CHECKING:
    from benchmarks.cache_tree import CacheTreeReport
    from benchmarks.planning import PlanningTimes
    from cascade_llm.cli.charts import Lines

__all__ = ["planning"]

KINDS = {
    "unchanged_s": "unchanged",
    "joins_s": "one joins",
    "leaves_s": "one leaves",
    "step_s": "whole step",
}
GROWTH_FROM = 256
"""Sequences; below, what a step costs in any case hides the growth."""


@click.command()
@click.option("--max-sequences", type=int, default=8192, show_default=True, help="Running sequences, at most.")
@click.option("--max-context-len", type=int, default=131072, show_default=True, help="Tokens of a context, at most.")
@click.option("--cache-pages", type=int, default=1_000_000, show_default=True, help="Of the cache tree; 0: none.")
@click.option("--cache-prefixes", type=int, default=10_000, show_default=True, help="Prompts in the cache tree.")
@click.option("--repeat", type=int, default=15, show_default=True, help="Plans of each kind; the median counts.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random token ids.")
@output_options
def planning(
    *,
    out: Outputs,
    max_sequences: int,
    max_context_len: int,
    cache_pages: int,
    cache_prefixes: int,
    repeat: int,
    seed: int,
) -> None:
    """Planning time by running sequences, levels and context; memory and time of a large prefix cache."""
    out.check()
    from benchmarks.cache_tree import CacheTreeLoad, measure_cache_tree
    from benchmarks.planning import measure_planning, planning_sweep

    loads = planning_sweep(max_sequences=max_sequences, max_context_len=max_context_len, seed=seed)
    tree = CacheTreeLoad(num_pages=cache_pages, num_prefixes=cache_prefixes, seed=seed) if cache_pages else None
    tree_report, times = None, []
    with run_bar(len(loads) + (tree is not None)) as on_run:
        if tree is not None:  # first: memory that others gave back would hide some of its own
            on_run("prefix cache")
            tree_report = measure_cache_tree(tree)
        for load in loads:
            on_run(f"{load.num_sequences:,} sequences, {load.num_levels} levels, {load.context_len:,} tokens")
            times.append(measure_planning(load, repeat=repeat))
    report = {
        "planning": [entry.as_dict() for entry in times],
        "growth": _growth(times),
        "cache_tree": None if tree_report is None else tree_report.as_dict(),
    }
    out.deliver(report, lambda: _print(times, tree_report), lambda: _charts(times))


def _print(times: Sequence[PlanningTimes], tree_report: CacheTreeReport | None) -> None:
    console = result_console()
    console.print("Planning of a decode step, medians in milliseconds of CPU time", style="bold")
    console.print(_table(times))
    for levels, exponents in _growth(times).items():
        listed = ", ".join(f"{KINDS[kind]} {exponent:.2f}" for kind, exponent in exponents.items())
        console.print(f"{levels} levels, growth from {GROWTH_FROM} sequences on (1 is linear): {listed}")
    if tree_report is not None:
        console.print(_tree_line(tree_report))


def _table(times: Sequence[PlanningTimes]) -> Table:
    table = Table()
    for heading in ("levels", "sequences", "context", *KINDS.values(), "levels used", "groups"):
        table.add_column(heading, justify="right")
    levels = 0
    for entry in times:
        load = entry.load
        if levels and levels != load.num_levels:
            table.add_section()
        levels = load.num_levels
        table.add_row(
            str(load.num_levels),
            f"{load.num_sequences:,}",
            f"{load.context_len:,}",
            *(f"{1e3 * getattr(entry, kind):.3f}" for kind in KINDS),
            str(entry.report.num_levels),
            f"{entry.report.num_groups:,}",
        )
    return table


def _growth(times: Sequence[PlanningTimes]) -> dict[int, dict[str, float]]:
    """By levels and kind, over the loads that differ in sequences alone."""
    from benchmarks.planning import growth_exponent

    context_len = times[0].load.context_len
    growth = {}
    for levels in sorted({entry.load.num_levels for entry in times}):
        alike = [
            entry
            for entry in times
            if entry.load.num_levels == levels
            and entry.load.context_len == context_len
            and entry.load.num_sequences >= GROWTH_FROM
        ]
        if len(alike) > 1:
            growth[levels] = {kind: growth_exponent(alike, kind) for kind in KINDS}
    return growth


def _tree_line(report: CacheTreeReport) -> str:
    load = report.load
    return (
        f"Prefix cache of {report.num_pages:,} pages of {load.page_size} tokens in {report.num_nodes:,} nodes, "
        f"{load.num_prefixes:,} prompts: {format_bytes(report.memory_bytes)} ({report.bytes_per_page:.0f} bytes a "
        f"page), built in {report.build_s:.1f} s ({1e6 * report.build_s / load.num_prefixes:.0f} µs a prompt). A "
        f"cached prompt found, held and released: {1e6 * report.hit_s:.0f} µs; an unknown one: "
        f"{1e6 * report.miss_s:.0f} µs; a page evicted: {1e6 * report.evict_s:.2f} µs."
    )


def _charts(times: Sequence[PlanningTimes]) -> list[Lines]:
    from cascade_llm.cli.charts import Lines

    context_len = times[0].load.context_len
    alike = [entry for entry in times if entry.load.context_len == context_len]
    charts = []
    for kind, name in KINDS.items():
        curves = {}
        for levels in sorted({entry.load.num_levels for entry in alike}):
            of_levels = [entry for entry in alike if entry.load.num_levels == levels]
            x = [float(entry.load.num_sequences) for entry in of_levels]
            curves[f"{levels} levels"] = (x, [1e3 * getattr(entry, kind) for entry in of_levels])
        title = f"planning, {name}, {context_len:,} tokens each"
        charts.append(
            Lines(title=title, x_label="running sequences", y_label="ms", curves=curves, log_x=True, log_y=True)
        )
    return charts
