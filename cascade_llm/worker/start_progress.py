"""How far a start is, for those who wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.weights.format import StoredTensor

__all__ = ["CAPTURING", "LOADING", "OnStart", "told_tensors"]

LOADING, CAPTURING = "loading weights", "capturing CUDA graphs"

OnStart = Callable[[str, int, int], None]
"""Told the stage, `LOADING` or `CAPTURING`, and how many bytes or graphs are done, of how many."""


def told_tensors(checkpoint: Checkpoint, on_start: OnStart | None) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a checkpoint; whoever waits is told of each that was taken."""
    done, total = 0, checkpoint.num_bytes
    for name, stored in checkpoint.stored_tensors():
        yield name, stored
        done += stored.num_bytes
        if on_start is not None:
            on_start(LOADING, min(done, total), total)
    if on_start is not None:
        on_start(LOADING, total, total)
