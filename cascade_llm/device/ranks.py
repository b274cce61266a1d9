"""Ranks: processes with a device each that hold a share of one model, and what they exchange.

Every rank makes the same exchanges in the same order. Sums and gathered parts go through `torch.distributed`: NCCL
between GPUs, where an exchange is queued on the stream and may be captured in a graph, and gloo between CPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from cascade_llm.errors import RankError

__all__ = ["Ranks", "Share", "join_ranks"]

LONGEST_WAIT = timedelta(hours=1)
"""For another rank: a rank that ends breaks the exchange, and the engine ends those that hang."""
LOOPBACK = "127.0.0.1"

dist: Any = distributed
"""Its stubs lack the methods of groups that exchange, and their options."""


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

    def __init__(self, index: int = 0, count: int = 1, group: Any = None) -> None:
        """`group`: a process group of `torch.distributed` that connects `count` ranks; None where there is one."""
        assert (group is None) == (count == 1)
        self.index, self.count = index, count
        self._group = group
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
        if self._group is not None:
            options = dist.AllreduceOptions()
            options.asyncOp = False
            self._wait_for(lambda group: group.allreduce([x], options))
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """On rank 0 the contiguous x [...] of every rank, all of one shape; on others none."""
        if self._group is None:
            return [x]
        options = dist.GatherOptions()
        options.rootRank, options.asyncOp = 0, False
        parts = [torch.empty_like(x) for _ in range(self.count)] if self.is_first else []
        self._wait_for(lambda group: group.gather([parts] if self.is_first else [], [x], options))
        return parts

    def broadcast(self, x: torch.Tensor) -> None:
        """Write rank 0's contiguous x [...] over that of the others."""
        if self._group is not None:
            options = dist.BroadcastOptions()
            options.rootRank, options.asyncOp = 0, False
            self._wait_for(lambda group: group.broadcast([x], options))

    def least(self, number: int, device: torch.device) -> int:
        """The smallest number that a rank has; waits for all. `device`: of the exchange."""
        if self._group is None:
            return number
        options = dist.AllreduceOptions()
        options.reduceOp, options.asyncOp = dist.ReduceOp.MIN, False
        numbers = torch.tensor([number], dtype=torch.int64, device=device)
        self._wait_for(lambda group: group.allreduce([numbers], options))
        return int(numbers)

    def close(self) -> None:
        """Let go of the connections; the others may still be at work."""
        group, self._group = self._group, None
        if group is not None:
            group.shutdown()

    def _wait_for(self, exchange: Callable[[Any], Any]) -> None:
        assert self._group is not None
        self.num_exchanges += 1
        try:
            work = exchange(self._group)
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise RankError(f"rank {self.index} lost another rank during an exchange: {error}") from error


def join_ranks(index: int, count: int, meeting_point: Path, device: torch.device) -> Ranks:
    """Meet the other ranks of this machine, and wait until all are there.

    Args:
        index, count: which rank this is, of how many
        meeting_point: a file that does not exist before the first rank comes, in a folder that only this user reads
        device: of this rank's tensors

    Raises:
        RankError: another rank has not come
    """
    if count == 1:
        return Ranks()
    try:
        store = dist.FileStore(str(meeting_point), count)
        return Ranks(index, count, _connected(store, index, count, device))
    except RuntimeError as error:
        raise RankError(f"rank {index} could not meet the others: {error}") from error


def _connected(store: Any, index: int, count: int, device: torch.device) -> Any:
    """A group of this machine's own: torch's default group would be the process's, and one alone."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        on_gpus = dist.ProcessGroupNCCL.Options()
        on_gpus._timeout = LONGEST_WAIT
        over_nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), index, count, on_gpus)
        over_nccl.eager_connect_single_device(device)
        return _group(store, over_nccl, dist.ProcessGroup.BackendType.NCCL, device)
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout, options._threads = LONGEST_WAIT, 1
    over_gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), index, count, options)
    return _group(store, over_gloo, dist.ProcessGroup.BackendType.GLOO, device)


def _group(store: Any, backend: Any, kind: Any, device: torch.device) -> Any:
    """The backend behind torch's dispatcher, so that exchanges are operators like all others."""
    group = dist.ProcessGroup(store, backend.rank(), backend.size())
    group._register_backend(torch.device(device.type), kind, backend)
    group._set_default_backend(kind)
    return group
