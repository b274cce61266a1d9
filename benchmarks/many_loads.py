"""Several loads on engines that are opened once, and the file that keeps what was measured of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cascade_llm.bench.load import Load
from cascade_llm.bench.setup import BenchModel
from cascade_llm.bench.sides import RUNS, OpenSide, Run, opened_sides
from cascade_llm.bench.throughput import ThroughputReport, measure_sides
from cascade_llm.errors import ConfigError

__all__ = ["compare_each", "read_results"]

Results = TypeVar("Results")


def compare_each(
    model: BenchModel,
    loads: Mapping[str, Load],
    *,
    with_off: bool = True,
    others: Sequence[OpenSide] = (),
    repeat: int = 3,
    runs: Sequence[Run] = RUNS,
    split_steps: bool = True,
    on_run: Callable[[str], None] = lambda run: None,
) -> Iterator[tuple[str, ThroughputReport]]:
    """Measure each of several loads on engines that are opened once; yields as results come.

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
            yield name, report
            if report.interrupted:
                return


def read_results(
    path: Path, command: str, settings: Mapping[str, Any], read: Callable[[Any], Results]
) -> tuple[dict[str, Any], Results]:
    """A whole file that is to be gone on with, and the results that `read` finds in it.

    Raises `ConfigError` where it holds something else, or was measured with other settings.
    """
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        before, results = written["settings"], read(written)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} does not hold results of `benchmarks {command}` ({error}): leave out --resume"
        ) from None
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise ConfigError(f"{path} was measured with another {', '.join(changed)}: give the same, or another --output")
    return written, results
