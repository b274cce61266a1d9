"""The demo's runs, timed, and their table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cascade_llm.cli.console import error_console, format_bytes
from cascade_llm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from cascade_llm.llm import LLM
    from cascade_llm.outputs import RequestOutput

__all__ = ["DemoRun", "Runs", "ratio_lines", "run_bar", "run_once", "runs_table", "take_turns"]

MEANINGS = {"cold": "prefill and decode", "warm": "prompts cached, so nearly all decode"}


@dataclass(frozen=True)
class DemoRun:
    """One run of all questions, and what the engine's counters gained."""

    elapsed_s: float
    gained: Mapping[str, int]

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens over the whole time, prefill included."""
        return self.gained["generated_tokens"] / self.elapsed_s


Runs = Mapping[str, Mapping[str, Sequence[DemoRun]]]
"""By engine ("on", "off"), then by kind ("cold", "warm")."""


def run_once(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams, *, progress: bool = False
) -> tuple[list[RequestOutput], DemoRun]:
    """All prompts, timed from the first one's arrival to the last token."""
    before = llm.stats()
    start_s = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=progress)
    elapsed_s = time.perf_counter() - start_s
    return outputs, DemoRun(elapsed_s, {name: count - before[name] for name, count in llm.stats().items()})


def take_turns(
    engines: Mapping[str, LLM],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    repeat: int,
    on_run: Callable[[str], None],
) -> Runs:
    """A cold and a warm run on each engine, `repeat` times, so that what else the machine does meets both."""
    runs: dict[str, dict[str, list[DemoRun]]] = {name: {kind: [] for kind in MEANINGS} for name in engines}
    for _ in range(repeat):
        for name, llm in engines.items():
            llm.reset_prefix_cache()
            for kind in MEANINGS:
                on_run(f"cascade {name}, {kind}")
                runs[name][kind].append(run_once(llm, prompts, params)[1])
    return runs


def runs_table(runs: Runs) -> Table:
    """One row per engine and kind: tokens per second, and the counters of its first run."""
    table = Table()
    table.add_column("cascade")
    table.add_column("run")
    for heading in ("tok/s", "lowest to highest", "KV read", "KV saved", "prefilled", "cached", "generated"):
        table.add_column(heading, justify="right")
    for engine, kinds in runs.items():
        for kind, of_kind in kinds.items():
            speeds, gained = [run.tokens_per_s for run in of_kind], of_kind[0].gained
            table.add_row(
                engine,
                kind,
                f"{statistics.median(speeds):.1f}",
                f"{min(speeds):.1f} to {max(speeds):.1f}",
                format_bytes(gained["kv_bytes_read"]),
                format_bytes(gained["kv_bytes_saved"]),
                f"{gained['prefilled_tokens']:,}",
                f"{gained['cached_tokens']:,}",
                f"{gained['generated_tokens']:,}",
            )
    return table


def ratio_lines(runs: Runs) -> list[str]:
    """On against off, per kind of run."""
    speeds = {
        (engine, kind): statistics.median(run.tokens_per_s for run in of_kind)
        for engine, kinds in runs.items()
        for kind, of_kind in kinds.items()
    }
    return [
        f"{kind} ({meaning}): on is {speeds['on', kind] / speeds['off', kind]:.2f} times as fast as off"
        for kind, meaning in MEANINGS.items()
    ]


@contextmanager
def run_bar(total: int) -> Iterator[Callable[[str], None]]:
    """Yields a function to call with a name before each run."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = error_console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=total)
        started: list[str] = []

        def on_run(name: str) -> None:
            bar.update(task, description=name, completed=len(started))
            started.append(name)

        yield on_run
