"""What the suite runs on: a CUDA device, or in tests a double of one."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cascade_llm import LLM
from cascade_llm.attention.flashinfer.backend import GpuPlatform

__all__ = ["CudaMachine", "Machine"]


class Machine(ABC):
    """A device with a stopwatch."""

    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def platform(self) -> GpuPlatform:
        """A stream and FlashInfer's calls."""

    @abstractmethod
    def seconds(self, work: Callable[[], object], *, captured: bool = True) -> float:
        """What one call of `work` takes on the device: the median of several, from a graph where it can be captured."""

    @abstractmethod
    def llm(self, config: Path, **options: Any) -> LLM:
        """An engine on dummy weights of a configuration."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for the device."""


class CudaMachine(Machine):
    """The current CUDA device, in bfloat16."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.dtype = torch.bfloat16

    def platform(self) -> GpuPlatform:
        """See `Machine`."""
        return GpuPlatform.cuda(self.device)

    def seconds(self, work: Callable[[], object], *, captured: bool = True) -> float:
        """See `Machine`."""
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        calls = 10
        graph = _captured(work, calls) if captured else None
        readings: list[float] = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            if graph is not None:
                graph.replay()
            else:
                for _ in range(calls):
                    work()
            end.record()
            torch.cuda.synchronize()
            readings.append(float(start.elapsed_time(end)) / 1000 / calls)
        return statistics.median(readings)

    def llm(self, config: Path, **options: Any) -> LLM:
        """See `Machine`."""
        return LLM(config, load_format="dummy", device="cuda", dtype="bfloat16", **options)

    def synchronize(self) -> None:
        """See `Machine`."""
        torch.cuda.synchronize()


def _captured(work: Callable[[], object], calls: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    return graph
