"""`python -m benchmarks goals`: the loads by which the engine is judged, in turns with another, saved as they come."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from benchmarks.peer_options import open_peer, peer_options
from cascade_llm.cli.console import error_console, result_console, run_bar
from cascade_llm.cli.field_options import SectionedCommand, engine_options, model_option, take_engine
from cascade_llm.cli.output_files import Outputs, output_options, write_json_file

if TYPE_CHECKING:
    from benchmarks.goals import GoalResult

__all__ = ["goals"]


@click.command(cls=SectionedCommand)
@model_option
@peer_options
@click.option("--loads", default="", help="Names of loads, with commas between; default: all.")
@click.option("--repeat", type=click.IntRange(min=1), default=2, show_default=True, help="Turns for each load.")
@click.option("--off/--no-off", "with_off", default=False, help="Compare with cascade attention off as well.")
@click.option("--resume", is_flag=True, help="Keep the loads that --output has already, and measure the others.")
@click.option("--markdown", type=click.Path(path_type=Path), help="Write the table to this file.")
@output_options
@engine_options(without=("enable_cascade_attention",))
def goals(
    *,
    out: Outputs,
    model: str,
    against: str | None,
    peer_python: Path | None,
    install_peer: bool,
    loads: str,
    repeat: int,
    with_off: bool,
    resume: bool,
    markdown: Path | None,
    **arguments: Any,
) -> None:
    """Measure the goal table: several loads, ours and another engine in turns, ratios against their goals.

    Each load's result goes to --output as soon as it is there.
    """
    options = take_engine(arguments)
    output = out.output
    if resume and output is None:
        raise click.UsageError("--resume needs --output, the file to go on with.")
    out.check(markdown, resume=resume)
    from benchmarks import goals_report as text
    from benchmarks.goals import choose_goals, goal_loads, goal_result
    from benchmarks.many_loads import compare_each, read_results
    from cascade_llm.bench.machine import describe_machine
    from cascade_llm.bench.setup import open_model
    from cascade_llm.bench.throughput import num_runs
    from cascade_llm.cli.throughput_report import setting_lines

    bench = open_model(model, options)
    chosen = choose_goals([name.strip() for name in loads.split(",") if name.strip()])
    settings = {"model": model, "repeat": repeat, "options": options}
    record: dict[str, Any] = {
        "model": model,
        "settings": settings,
        "machine": describe_machine(),
        "sides": {},
        "reports": {},
    }
    done: dict[str, GoalResult] = {}
    if resume and output is not None and output.exists():
        before, done = read_results(output, "goals", settings, _whole_results)
        record |= {name: before.get(name, {}) for name in ("sides", "reports")}
    wanted = goal_loads(bench, {name: goal for name, goal in chosen.items() if name not in done})
    interrupted = False
    if wanted:
        others = open_peer(bench, *wanted.values(), against=against, peer_python=peer_python, install_peer=install_peer)
        num_sides = 1 + with_off + len(others)
        total = sum(num_runs(num_sides, repeat, load, with_off=with_off) for load in wanted.values()) + len(others)
        with run_bar(total) as on_run:
            reports = compare_each(
                bench, wanted, with_off=with_off, others=others, repeat=repeat, split_steps=False, on_run=on_run
            )
            try:
                for name, report in reports:
                    done[name] = goal_result(name, report)
                    record["sides"] = {side: dict(flags) for side, flags in report.sides.items()}
                    record["reports"][name] = report.as_dict()
                    interrupted = interrupted or report.interrupted
                    if output is not None:
                        results = {name: result.as_dict() for name, result in done.items()}
                        write_json_file(output, {**record, "results": results})
                    error_console().print(text.result_line(done[name]), style="dim")
            except KeyboardInterrupt:
                if not done:
                    raise
                interrupted = True
    ordered = [done[name] for name in chosen if name in done]
    if markdown is not None:
        markdown.write_text(text.markdown(ordered), encoding="utf-8")

    def show() -> None:
        result_console().print(text.goals_table(ordered))
        for line in text.comparison_lines(ordered):
            result_console().print(line)
        for line in setting_lines(record["sides"], record["machine"]):
            result_console().print(line, style="dim")

    whole = {**record, "results": {result.name: result.as_dict() for result in ordered}}
    caption = text.caption(record["machine"], repeat)
    out.deliver(whole, show, lambda: text.charts(ordered), caption=caption, columns=2)
    if interrupted:
        raise click.Abort


def _whole_results(written: Any) -> dict[str, GoalResult]:
    """The results in a file that were not interrupted."""
    from benchmarks.goals import GoalResult

    reports = written["reports"]
    results = written["results"].items()
    return {name: GoalResult.from_dict(result) for name, result in results if not reports[name]["interrupted"]}
