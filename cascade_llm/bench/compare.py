"""Loads on several engines: opens the sides once, measures load by load in turns, closes them.

Our own engine with cascade attention on and off are sides; whoever has other engines hands in how they are opened.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from cascade_llm.bench.load import Load
from cascade_llm.bench.setup import BenchModel
from cascade_llm.bench.sides import RUNS, EngineSide, Run, Side
from cascade_llm.bench.throughput import ThroughputReport, measure_sides

__all__ = ["OpenSide", "compare", "compare_each", "opened_sides"]

OnRun = Callable[[str], None]
OpenSide = Callable[[], Side]
"""Starts another engine, with the first of the loads that are measured and room for all of them."""


def compare(
    model: BenchModel,
    load: Load,
    *,
    with_off: bool = True,
    others: Sequence[OpenSide] = (),
    repeat: int = 3,
    split_steps: bool = True,
    on_run: OnRun = lambda run: None,
) -> ThroughputReport:
    """Cascade attention on, and in turns with it off, and other engines, where wanted.

    Raises what opening the engines raises; see `measure_sides` for interruptions.
    """
    loads = {load.name: load}
    reports = compare_each(
        model, loads, with_off=with_off, others=others, repeat=repeat, split_steps=split_steps, on_run=on_run
    )
    return next(iter(list(reports)))[1]


def compare_each(
    model: BenchModel,
    loads: Mapping[str, Load],
    *,
    with_off: bool = True,
    others: Sequence[OpenSide] = (),
    repeat: int = 3,
    runs: Sequence[Run] = RUNS,
    split_steps: bool = True,
    on_run: OnRun = lambda run: None,
) -> Iterator[tuple[str, ThroughputReport]]:
    """As `compare` for each of several loads, on engines that are opened once; yields as results come.

    An interrupted report is the last.
    """
    limits, shape = model.limits(), model.shape()
    with opened_sides(model, *loads.values(), with_off=with_off, others=others, on_run=on_run) as sides:
        for name, load in loads.items():
            for side in sides:
                side.use_load(load)
            report = ThroughputReport(model.name, load, limits)
            measure_sides(
                report,
                sides,
                shape,
                repeat=repeat,
                runs=runs,
                split_steps=split_steps,
                on_run=lambda run, name=name: on_run(f"{name}: {run}"),  # type: ignore[misc]
            )
            report.peak_memory_bytes.update(_peak_memory(sides))
            yield name, report
            if report.interrupted:
                return


@contextmanager
def opened_sides(
    model: BenchModel,
    *loads: Load,
    with_off: bool,
    others: Sequence[OpenSide] = (),
    on_run: OnRun = lambda run: None,
) -> Iterator[list[Side]]:
    """Cascade on, off and other engines, where wanted, each with the first load and room for all."""
    with ExitStack() as stack:
        sides: list[Side] = []

        def add(side: Side) -> None:
            stack.callback(side.close)
            sides.append(side)

        add(EngineSide("cascade on", model.open(*loads, enable_cascade_attention=True), loads[0]))
        if with_off:
            add(EngineSide("cascade off", model.open(*loads, enable_cascade_attention=False), loads[0]))
        for open_side in others:
            on_run("starting another engine")
            add(open_side())
        yield sides


def _peak_memory(sides: list[Side]) -> dict[str, int]:
    """By side; ours where one engine alone is in this process."""
    engines = [side for side in sides if isinstance(side, EngineSide)]
    memory = {engines[0].name: _own_peak_memory_bytes()} if len(engines) == 1 else {}
    told = {side.name: side.peak_memory_bytes() for side in sides if not isinstance(side, EngineSide)}
    return memory | {name: num_bytes for name, num_bytes in told.items() if num_bytes is not None}


def _own_peak_memory_bytes() -> int:
    """The most that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
