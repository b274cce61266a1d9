"""Ranks that stand for those on GPUs: what they exchange goes through operators, which a capture records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import distributed

from cascade_llm.device.ranks import Ranks
from cascade_llm.device.torch_exchange import TorchExchange, group_of

__all__ = ["join_by_gloo"]


def join_by_gloo(index: int, count: int, meeting_point: Path, device: torch.device) -> Ranks:
    """As `join_ranks` does with NCCL, on doubles."""
    dist: Any = distributed
    store = dist.FileStore(str(meeting_point), count)
    options = dist.ProcessGroupGloo._Options()
    options._devices, options._threads = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")], 1
    over_gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), index, count, options)
    group = group_of(store, over_gloo, dist.ProcessGroup.BackendType.GLOO, device)
    return Ranks(index, count, TorchExchange(group))
