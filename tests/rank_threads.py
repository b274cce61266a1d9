"""Ranks as threads of one process: the same exchanges as between processes, without their start."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from cascade_llm.device.ranks import Ranks, join_ranks

T = TypeVar("T")


Join = Callable[[int, int, Path, torch.device], Ranks]
"""As `join_ranks`."""


def in_ranks(count: int, folder: Path, work: Callable[[Ranks], T], join: Join = join_ranks) -> list[T]:
    """What `work` returns on each of `count` ranks, in order; they meet in an empty folder."""

    def run(index: int) -> T:
        ranks = join(index, count, folder / "ranks", torch.device("cpu"))
        try:
            return work(ranks)
        finally:
            ranks.least(0, torch.device("cpu"))
            ranks.close()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
