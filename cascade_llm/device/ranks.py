"""Ranks: processes with a device each that hold a share of one model, and what they exchange.

Every rank makes the same exchanges in the same order: through NCCL between GPUs, and between CPUs through memory that
they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from cascade_llm.device.exchange import Exchange
from cascade_llm.device.memory_exchange import MemoryExchange
from cascade_llm.device.torch_exchange import connect_gpus
from cascade_llm.errors import RankError

__all__ = ["Ranks", "Share", "join_ranks"]

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """The part of a dimension that one rank holds."""

    total: int
    first: int
    size: int

    @classmethod
    def whole(cls, total: int) -> Share:
        """All of a dimension."""
        return cls(total, 0, total)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing."""
        return self.size == self.total

    @property
    def slice(self) -> slice:
        """Where the part lies."""
        return slice(self.first, self.first + self.size)

    def times(self, length: int) -> Share:
        """The same part, where each element stands for `length` others that lie together."""
        return Share(self.total * length, self.first * length, self.size * length)


class Ranks:
    """One rank's view of all ranks. One rank alone exchanges nothing."""

    def __init__(self, index: int = 0, count: int = 1, exchange: Exchange | None = None) -> None:
        """`exchange`: connects `count` ranks; None where there is one."""
        assert (exchange is None) == (count == 1)
        self.index, self.count = index, count
        self._exchange = exchange
        self.num_exchanges = 0
        """Exchanges that this rank has begun."""

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which samples."""
        return self.index == 0

    def share(self, total: int, unit: int = 1) -> Share:
        """This rank's part of a dimension: whole units, at most one more than another rank's."""
        return self.share_of(self.index, total, unit)

    def share_of(self, rank: int, total: int, unit: int = 1) -> Share:
        """As `share`, of any rank; the last unit may be short."""
        num_units = -(-total // unit)
        first, end = (min(total, num_units * number // self.count * unit) for number in (rank, rank + 1))
        return Share(total, first, end - first)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of contiguous x [...], in its place and dtype."""
        if self._exchange is not None:
            self._exchanged(self._exchange.sum, x)
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """On rank 0 the contiguous x [...] of every rank, all of one shape; on others none."""
        return [x] if self._exchange is None else self._exchanged(self._exchange.gather, x)

    def broadcast(self, x: torch.Tensor) -> None:
        """Write rank 0's contiguous x [...] over that of the others."""
        if self._exchange is not None:
            self._exchanged(self._exchange.broadcast, x)

    def least(self, number: int, device: torch.device) -> int:
        """The smallest number that a rank has; waits for all. `device`: of the exchange."""
        if self._exchange is None:
            return number
        numbers = torch.tensor([number], dtype=torch.int64, device=device)
        self._exchanged(self._exchange.least, numbers)
        return int(numbers)

    def close(self) -> None:
        """Leave the others, who may still be at work."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.close()

    def _exchanged(self, method: Callable[[torch.Tensor], T], x: torch.Tensor) -> T:
        self.num_exchanges += 1
        try:
            return method(x)
        except RuntimeError as error:
            raise RankError(f"rank {self.index} lost another rank during an exchange: {error}") from error


def join_ranks(index: int, count: int, meeting_point: Path, device: torch.device) -> Ranks:
    """Meet the other ranks of this machine, and wait until all are there.

    Args:
        index, count: which rank this is, of how many
        meeting_point: a file that does not exist before the first rank comes, in a folder that only this user reads
        device: of this rank's tensors

    Raises:
        RankError: another rank has not come, or there is no room for what they share
    """
    if count == 1:
        return Ranks()
    try:
        if device.type == "cuda":
            return Ranks(index, count, connect_gpus(index, count, meeting_point, device))
        return Ranks(index, count, MemoryExchange(index, count, meeting_point))
    except (RuntimeError, OSError) as error:
        raise RankError(f"rank {index} could not meet the others: {error}") from error
