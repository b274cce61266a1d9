"""What the suite runs on: a CUDA device, or a double of one."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from cascade_llm import LLM
from cascade_llm.attention.flashinfer.backend import GpuPlatform
from cascade_llm.device import stream
from scripts.gpu_suite.sizes import Sizes

__all__ = ["CARDS", "Card", "CudaMachine", "Machine", "Replay", "known_card", "measured_rates"]

COPY_BYTES, MATRIX_SIZE = 2 << 30, 8192


class Card(NamedTuple):
    """What floors and sizes are made of."""

    name: str
    copy_bytes_per_s: float
    """A large copy, bytes read and written."""
    matrix_flops_per_s: float
    """A large product in bfloat16."""
    l2_bytes: int


CARDS = (Card("H200", 4.3e12, 790e12, 60 << 20), Card("H100", 3.0e12, 700e12, 50 << 20))
"""Others are measured."""


class Replay(NamedTuple):
    """One replay of a graph, in seconds from the first one's begin."""

    begin_s: float
    end_s: float


class Machine(ABC):
    """A device with a stopwatch."""

    device: torch.device
    dtype: torch.dtype
    sizes: Sizes | None = None
    """What is run, where it is not the user's choice."""

    @property
    @abstractmethod
    def card(self) -> Card:
        """What the device can do."""

    @property
    @abstractmethod
    def memory_bytes(self) -> int:
        """Of the device."""

    @property
    @abstractmethod
    def arch(self) -> tuple[int, int]:
        """Compute capability of the device."""

    @property
    @abstractmethod
    def num_devices(self) -> int:
        """Such devices of this machine."""

    @abstractmethod
    def platform(self) -> GpuPlatform:
        """A stream and FlashInfer's calls."""

    @abstractmethod
    def llm(self, config: Path, **options: Any) -> LLM:
        """An engine on dummy weights of a configuration."""

    @abstractmethod
    def seconds(self, work: Callable[[], object]) -> float:
        """What one call of `work` takes on the device, replayed from a graph: the median of several."""

    @abstractmethod
    def replays(self) -> Any:
        """A context that yields a function which tells the replays of graphs inside it, waiting for the device."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for the device."""


class CudaMachine(Machine):
    """The current CUDA device, in bfloat16."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.dtype = torch.bfloat16
        self._properties = torch.cuda.get_device_properties(self.device)
        self._card: Card | None = None

    @property
    def card(self) -> Card:
        """See `Machine`; measured once where the table does not know the name."""
        if self._card is None:
            self._card = known_card(self._properties.name)
        if self._card is None:
            rates = measured_rates(self)
            self._card = Card(self._properties.name, *rates, int(getattr(self._properties, "L2_cache_size", 50 << 20)))
        return self._card

    @property
    def memory_bytes(self) -> int:
        """See `Machine`."""
        return int(self._properties.total_memory)

    @property
    def arch(self) -> tuple[int, int]:
        """See `Machine`."""
        return int(self._properties.major), int(self._properties.minor)

    @property
    def num_devices(self) -> int:
        """See `Machine`."""
        return torch.cuda.device_count()

    def platform(self) -> GpuPlatform:
        """See `Machine`."""
        return GpuPlatform.cuda(self.device)

    def llm(self, config: Path, **options: Any) -> LLM:
        """See `Machine`."""
        always: dict[str, Any] = {
            "load_format": "dummy",
            "device": "cuda",
            "dtype": "bfloat16",
            "attention_backend": "flashinfer",
        }
        return LLM(config, **always, **options)  # a backend that was only fallen back to would be measured unseen

    def seconds(self, work: Callable[[], object]) -> float:
        """See `Machine`."""
        for _ in range(2):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        readings: list[float] = []
        for _ in range(7):
            begin, end = _event(), _event()
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            readings.append(float(begin.elapsed_time(end)) / 1000)
        return statistics.median(readings)

    @contextmanager
    def replays(self) -> Iterator[Callable[[], list[Replay]]]:
        """See `Machine`; events stand around every replay."""
        events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        original = stream._CudaGraph.replay

        def replay(graph: stream._CudaGraph) -> None:
            begin, end = _event(), _event()
            begin.record()
            original(graph)
            end.record()
            events.append((begin, end))

        def told() -> list[Replay]:
            torch.cuda.synchronize()
            return [
                Replay(*(events[0][0].elapsed_time(event) / 1000 for event in (begin, end))) for begin, end in events
            ]

        with patch.object(stream._CudaGraph, "replay", replay):
            yield told

    def synchronize(self) -> None:
        """See `Machine`."""
        torch.cuda.synchronize()


def known_card(name: str) -> Card | None:
    """The table's entry for a device of that name."""
    return next((card for card in CARDS if card.name in name), None)


def measured_rates(
    machine: Machine, copy_bytes: int = COPY_BYTES, matrix_size: int = MATRIX_SIZE
) -> tuple[float, float]:
    """Bytes per second of a large copy, read and written, and flops per second of a large product."""
    source = torch.empty(copy_bytes, dtype=torch.uint8, device=machine.device)
    target = torch.empty_like(source)
    copy_s = machine.seconds(lambda: target.copy_(source))
    a = torch.randn(matrix_size, matrix_size, device=machine.device).to(machine.dtype)
    b, c = a.clone(), torch.empty_like(a)
    product_s = machine.seconds(lambda: torch.mm(a, b, out=c))
    return 2 * copy_bytes / copy_s, 2 * matrix_size**3 / product_s


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
