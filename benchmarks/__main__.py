"""`python -m benchmarks`: what stands behind the figures of README and log."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from benchmarks.agents import AgentsWorkload
from benchmarks.peer_options import open_peer, peer_options
from cascade_llm.bench.workloads import WORKLOADS
from cascade_llm.cli import bench_latency, bench_throughput
from cascade_llm.cli.bench_workloads import WorkloadGroup
from cascade_llm.cli.main import RootGroup, run_command

PLACES = {
    "goals": "benchmarks.goals_command:goals",
    "growth": "benchmarks.growth_command:growth",
    "planning": "benchmarks.planning_command:planning",
    "perplexity": "benchmarks.perplexity_command:perplexity",
    "throughput": "benchmarks.__main__:throughput",
    "latency": "benchmarks.__main__:latency",
    "serve": "benchmarks.serve_command:serve",
}


LOADS = {**WORKLOADS, AgentsWorkload.name: AgentsWorkload}


def _measure_against(module: Any, online: bool) -> Any:
    """The command of the package, with another engine beside ours."""

    def measure(
        workload: Any, *, against: str | None, peer_python: Path | None, install_peer: bool, **arguments: Any
    ) -> None:
        def open_others(bench: Any, load: Any) -> Any:
            return open_peer(
                bench, load, against=against, peer_python=peer_python, install_peer=install_peer, online=online
            )

        module.measure(workload, open_others=open_others, **arguments)

    return measure


@click.group(
    cls=WorkloadGroup,
    workloads=LOADS,
    run=_measure_against(bench_throughput, online=False),
    options=lambda command: peer_options(bench_throughput.throughput_options(command)),
)
def throughput() -> None:
    """As `cascade-llm bench throughput`, another engine in turns with ours."""


@click.group(
    cls=WorkloadGroup,
    workloads=LOADS,
    run=_measure_against(bench_latency, online=True),
    options=lambda command: peer_options(bench_latency.latency_options(command)),
)
def latency() -> None:
    """As `cascade-llm bench latency`, another engine in turns with ours."""


@click.group(cls=RootGroup, places=PLACES)
def benchmarks() -> None:
    """Score tables against other engines, growth with batch and prefix, planning, perplexity of quantized files."""


if __name__ == "__main__":
    sys.exit(run_command(benchmarks, "python -m benchmarks"))
