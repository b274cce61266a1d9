"""`cascade-llm bench`: measurements on the user's own machine."""

from __future__ import annotations

import click

from cascade_llm.cli.lazy_group import LazyGroup

__all__ = ["bench"]

PLACES = {
    "throughput": "cascade_llm.cli.bench_throughput:throughput",
    "latency": "cascade_llm.cli.bench_latency:latency",
    "goals": "cascade_llm.cli.bench_goals:goals",
    "attention": "cascade_llm.cli.bench_attention:attention",
    "growth": "cascade_llm.cli.bench_growth:growth",
    "serve": "cascade_llm.cli.bench_serve:serve",
    "plan": "cascade_llm.cli.bench_plan:plan",
    "calibrate": "cascade_llm.cli.bench_calibrate:calibrate",
}


@click.group(cls=LazyGroup, places=PLACES)
def bench() -> None:
    """Measure on this machine."""
