"""One load on several engines: makes the sides, measures them in turns, closes them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from cascade_llm.bench.load import Load
from cascade_llm.bench.peer_environment import PeerInterpreter
from cascade_llm.bench.peer_side import PeerSide
from cascade_llm.bench.setup import BenchModel
from cascade_llm.bench.sides import EngineSide, Side
from cascade_llm.bench.throughput import ThroughputReport, measure_sides

__all__ = ["compare"]


def compare(
    model: BenchModel,
    load: Load,
    *,
    with_off: bool = True,
    peer: PeerInterpreter | None = None,
    repeat: int = 3,
    split_steps: bool = True,
    on_run: Callable[[str], None] = lambda run: None,
) -> ThroughputReport:
    """Cascade attention on, and in turns with it off, and another engine, where wanted.

    Raises what opening the engines raises; see `measure_sides` for interruptions.
    """
    report = ThroughputReport(model.name, load, model.limits())
    with ExitStack() as stack:
        sides: list[Side] = []

        def add(side: Side) -> None:
            stack.callback(side.close)
            sides.append(side)

        add(EngineSide("cascade on", model.open(load, enable_cascade_attention=True), load))
        if with_off:
            add(EngineSide("cascade off", model.open(load, enable_cascade_attention=False), load))
        if peer is not None:
            on_run(f"starting {peer.name}")
            add(PeerSide(peer, model, load))
        return measure_sides(report, sides, model.shape(), repeat=repeat, split_steps=split_steps, on_run=on_run)
