#!/usr/bin/env python
"""Ours and another engine by processor time, one thread each: for machines on which other programs compute.

    PYTHONPATH=. scripts/processor_time.py MODEL --against llama.cpp --peer-python PYTHON [--loads prefill,one,512x16]
        [--rounds 3] [NAME=VALUE ...]

Sides take turns, and a turn costs the nanoseconds that the kernel says its side's process ran. Waiting for a processor
does not count; caches and memory that others use do. NAME=VALUE are options of our engine, such as `dtype=float32`.
`prefill` is a prompt of 128 tokens alone; other loads are those of `python -m benchmarks goals`, which measures real
time, for a quiet machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.goals import GOALS
from benchmarks.peer_side import PeerSide, peer_for
from cascade_llm.bench.setup import BenchModel, open_model
from cascade_llm.bench.sides import RUNS, Run, Side, opened_sides
from cascade_llm.bench.workloads import SharedPrefixWorkload
from cascade_llm.errors import CascadeError

PREFILL = SharedPrefixWorkload(prefix_len=0, num_requests=1, suffix_len=128, output_len=1)


def processor_s(pid: int) -> float:
    """Seconds that all threads of a process have run."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def measure(side: Side, run: Run) -> float:
    """Processor seconds of one run; of an engine without children."""
    pid = side._process._process.pid if isinstance(side, PeerSide) and side._process else os.getpid()
    before = processor_s(pid)
    side.run(run)
    return processor_s(pid) - before


def compare(model: BenchModel, sides: Sequence[Side], name: str, rounds: int) -> dict[str, list[float]]:
    """Medians of tokens per processor second, by quantity and in the order of the sides."""
    load = model.load(PREFILL if name == "prefill" else GOALS[name].workload)
    runs = ("cold",) if name == "prefill" else RUNS
    seconds: dict[tuple[int, Run], list[float]] = {}
    for side in sides:
        side.use_load(load)
    for turn in range(rounds):
        for index in sorted(range(len(sides)), reverse=turn % 2 == 1):
            for run in runs:
                seconds.setdefault((index, run), []).append(measure(sides[index], run))
    took = {key: median(values) for key, values in seconds.items()}
    order = range(len(sides))
    if name == "prefill":
        return {"prefill": [load.num_prompt_tokens / took[i, "cold"] for i in order]}
    decoded = load.num_generated - load.num_sequences
    return {
        "decode": [decoded / (took[i, "warm"] - took[i, "first"]) for i in order],
        "cold": [load.num_generated / took[i, "cold"] for i in order],
    }


def main(arguments: Sequence[str], tell: Callable[[str], object] = print) -> int:
    """One line for each quantity of each load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("options", nargs="*", metavar="NAME=VALUE")
    parser.add_argument("--against", required=True)
    parser.add_argument("--peer-python", type=Path)
    parser.add_argument("--loads", default="prefill,one,512x16")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_intermixed_args(arguments)
    try:
        options = dict(option.split("=", 1) for option in given.options)
        model = open_model(given.model, {**options, "num_threads": 1})
        names = given.loads.split(",")
        loads = [model.load(PREFILL if name == "prefill" else GOALS[name].workload) for name in names]
        peer = peer_for(given.against, model, python=given.peer_python)
        with opened_sides(model, *loads, with_off=False, others=[partial(PeerSide, peer, model, *loads)]) as sides:
            for name in names:
                for quantity, (ours, theirs) in compare(model, sides, name, given.rounds).items():
                    tell(f"{name} {quantity}: {ours:.1f} and {theirs:.1f} tokens a second, {ours / theirs:.2f} times")
    except CascadeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
