"""`cascade-llm bench attention`: one layer of attention over trees of prefixes, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from cascade_llm.cli.console import error_console, result_console, run_bar
from cascade_llm.cli.output_files import Outputs, output_options
from cascade_llm.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from cascade_llm.bench.attention_trees import TreeResult
    from cascade_llm.bench.machine_limits import MachineLimits
    from cascade_llm.cli.charts import Bars

__all__ = ["attention"]


@click.command()
@click.option(
    "--tree",
    "trees",
    multiple=True,
    help="Nodes per level / tokens per node; default: a public list.",
)
@click.option("--heads", multiple=True, default=("32/8",), show_default=True, help="Query heads / KV heads.")
@click.option("--head-dim", type=int, default=128, show_default=True, help="Of every head.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--backend", default="auto", show_default=True, help="The attention backend.")
@click.option("--num-threads", type=int, help="CPU threads; default: torch's own number.")
@click.option(
    "--measure-s",
    type=click.FloatRange(min=0),
    default=0.5,
    show_default=True,
    help="Seconds for each of the two plans.",
)
@output_options
def attention(
    *,
    out: Outputs,
    trees: Sequence[str],
    heads: Sequence[str],
    head_dim: int,
    device: str,
    dtype: str,
    backend: str,
    num_threads: int | None,
    measure_s: float,
) -> None:
    """Time one layer of decode attention over trees of shared prefixes: the planner's plan against one level."""
    out.check()
    from cascade_llm.bench.attention_trees import HeadLayout, measure_tree, parse_trees
    from cascade_llm.bench.machine import describe_machine
    from cascade_llm.bench.machine_limits import machine_limits
    from cascade_llm.config import EngineOptions
    from cascade_llm.device.devices import resolve_device, resolve_dtype

    EngineOptions(device=device, dtype=dtype, num_threads=num_threads)
    shapes, layouts = parse_trees(trees), [HeadLayout.parse(text, head_dim) for text in heads]
    where = resolve_device(device)
    what = resolve_dtype(dtype, "bfloat16", where)
    limits = machine_limits(where, what, num_threads=num_threads)
    results: list[TreeResult] = []
    interrupted = False
    with run_bar(len(shapes) * len(layouts)) as on_run:
        try:
            for layout in layouts:
                for shape in shapes:
                    on_run(f"{shape}, {layout} heads")
                    try:
                        results.append(
                            measure_tree(
                                shape,
                                layout,
                                limits,
                                device=where,
                                dtype=what,
                                backend=backend,
                                num_threads=num_threads,
                                measure_s=measure_s,
                            )
                        )
                    except ConfigError as error:
                        if trees:
                            raise
                        error_console().print(str(error), style="dim")  # of the public list, what fits
        except KeyboardInterrupt:
            if not results:
                raise
            interrupted = True
    if not results:
        raise ConfigError("no tree of the public list fits the memory: choose fewer heads, or give --tree")
    record: dict[str, Any] = {
        "results": [result.as_dict() for result in results],
        "limits": vars(limits),
        "interrupted": interrupted,
        "machine": describe_machine(),
    }
    caption = "; ".join(f"{index}: {tree}" for index, tree in enumerate(dict.fromkeys(r.tree for r in results)))
    out.deliver(record, lambda: _print(results, limits), lambda: _charts(results), caption=caption)
    if interrupted:
        raise click.Abort


def _print(results: Sequence[TreeResult], limits: MachineLimits) -> None:
    console = result_console()
    console.print(_table(results))
    console.print(
        f"limit: {limits.bytes_per_s / 1e9:,.1f} GB/s, {limits.flops_per_s / 1e9:,.0f} GFLOP/s in {limits.dtype}, "
        f"{limits.num_threads} threads of {limits.device}",
        style="dim",
    )
    for line in _cost_lines(results):
        console.print(line, style="dim")


def _table(results: Sequence[TreeResult]) -> Table:
    from rich.table import Table

    table = Table()
    for heading in ("tree: nodes / tokens", "heads", "levels"):
        table.add_column(heading)
    for heading in ("plan, ms", "one level, ms", "speed-up", "share of limit", "prepare, ms", "planning, ms"):
        table.add_column(heading, justify="right")
    for result in results:
        table.add_row(
            result.tree,
            result.heads,
            str(result.num_levels),
            f"{result.cascade_s * 1e3:.3f}",
            f"{result.one_level_s * 1e3:.3f}",
            f"{result.speedup:.2f}",
            f"{result.floor_s / result.cascade_s:.0%}",
            f"{result.prepare_s * 1e3:.3f}",
            f"{result.planning_s * 1e3:.3f}",
        )
    return table


def _cost_lines(results: Sequence[TreeResult]) -> Iterator[str]:
    """Where the constants that chose the plans come from, which may differ from layout to layout."""
    heads_by_source: dict[str, list[str]] = {}
    for result in results:
        heads = heads_by_source.setdefault(result.costs, [])
        if result.heads not in heads:
            heads.append(result.heads)
    for source, heads in heads_by_source.items():
        whose = f" ({', '.join(heads)} heads)" if len(heads_by_source) > 1 else ""
        yield f"cost model: {source}{whose}"


def _charts(results: Sequence[TreeResult]) -> list[Bars]:
    from cascade_llm.cli.charts import Bars

    trees, layouts = [list(dict.fromkeys(names)) for names in zip(*((r.tree, r.heads) for r in results), strict=True)]
    by_key = {(result.tree, result.heads): result for result in results}

    def bars(title: str, y_label: str, value: str) -> Bars:
        rows = {
            layout: [by_key[tree, layout].as_dict()[value] if (tree, layout) in by_key else None for tree in trees]
            for layout in layouts
        }
        return Bars(title=title, y_label=y_label, groups=[str(i) for i in range(len(trees))], values=rows)

    return [bars("speed-up over one level", "times", "speedup"), bars("share of the limit", "", "share_of_limit")]
