"""Exchanges by a process group of `torch.distributed`: NCCL between GPUs.

An exchange is queued on the stream, and may be captured in a graph.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from cascade_llm.device.exchange import Exchange

__all__ = ["TorchExchange", "connect_gpus", "group_of"]

LONGEST_WAIT = timedelta(hours=1)
"""For another rank: a rank that ends breaks the exchange, and the engine ends those that hang."""

dist: Any = distributed
"""Its stubs lack the methods of groups that exchange, and their options."""


class TorchExchange(Exchange):
    """See `Exchange`."""

    def __init__(self, group: Any) -> None:
        """`group`: a `torch.distributed.ProcessGroup`."""
        self._group = group

    def sum(self, x: torch.Tensor) -> None:
        """See `Exchange`."""
        _wait(self._group.allreduce([x], _waited_for(dist.AllreduceOptions())))

    def least(self, x: torch.Tensor) -> None:
        """See `Exchange`."""
        options = _waited_for(dist.AllreduceOptions())
        options.reduceOp = dist.ReduceOp.MIN
        _wait(self._group.allreduce([x], options))

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """See `Exchange`."""
        options = _waited_for(dist.GatherOptions())
        options.rootRank = 0
        parts = [torch.empty_like(x) for _ in range(self._group.size())] if self._group.rank() == 0 else []
        _wait(self._group.gather([parts] if parts else [], [x], options))
        return parts

    def broadcast(self, x: torch.Tensor) -> None:
        """See `Exchange`."""
        options = _waited_for(dist.BroadcastOptions())
        options.rootRank = 0
        _wait(self._group.broadcast([x], options))

    def close(self) -> None:
        """See `Exchange`."""
        self._group.shutdown()


def connect_gpus(index: int, count: int, meeting_point: Path, device: torch.device) -> TorchExchange:
    """Meet the other ranks, see `ranks.join_ranks`; raises `RuntimeError`."""
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = LONGEST_WAIT
    store = dist.FileStore(str(meeting_point), count)
    over_nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), index, count, options)
    over_nccl.eager_connect_single_device(device)
    return TorchExchange(group_of(store, over_nccl, dist.ProcessGroup.BackendType.NCCL, device))


def group_of(store: Any, backend: Any, kind: Any, device: torch.device) -> Any:
    """A group of this engine's own, as torch's default group would be the process's, and one alone.

    The backend lies behind torch's dispatcher, so that exchanges are operators like all others.
    """
    group = dist.ProcessGroup(store, backend.rank(), backend.size())
    group._register_backend(torch.device(device.type), kind, backend)
    group._set_default_backend(kind)
    return group


def _waited_for(options: Any) -> Any:
    options.asyncOp = False
    return options


def _wait(work: Any) -> None:
    if work is not None:
        work.wait()
