"""One queue of work on a device, as the host sees it: copies, events and graphs run in the order they were given.

The host writes into pinned buffers, queues a copy and goes on; it may not touch such a buffer before an `Event` that
was recorded behind the copy has passed. All GPU work of an engine goes through one stream, so kernels, copies and graph
replays never overtake each other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

__all__ = ["CudaStream", "DeviceStream", "Event", "Graph"]


class Event(ABC):
    """A point in a stream."""

    @abstractmethod
    def synchronize(self) -> None:
        """Block the host until all work queued before the event is done."""


class Graph(ABC):
    """Captured work."""

    @abstractmethod
    def replay(self) -> None:
        """Queue the captured work; it reads and writes the buffers that it was captured with."""


class DeviceStream(ABC):
    """The stream that an engine works on."""

    device: torch.device

    @abstractmethod
    def pinned(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A zeroed host buffer [num_elements] that the device copies from and to without blocking.

        Dropped with a copy from it under way, it is not handed out again before that copy is done.
        """

    @abstractmethod
    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy between a pinned host buffer and a device tensor, both [...] of one shape and dtype."""

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of a host tensor [...] on the device, queued: the host does not wait, and may change it at once."""
        host = self.pinned(values.numel(), values.dtype)
        host.copy_(values.flatten())
        copy = torch.empty(values.shape, dtype=values.dtype, device=self.device)
        self.copy(copy.view(-1), host)
        return copy

    @abstractmethod
    def record_event(self) -> Event:
        """A new event at this point of the queue, behind every copy so far."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Graph:
        """Record work as a graph. All graphs share one memory pool; the work must have run before, without capture."""

    @abstractmethod
    def active(self) -> AbstractContextManager[None]:
        """Make this the stream that torch and FlashInfer queue on."""

    @abstractmethod
    def pool_bytes(self) -> int:
        """Device memory that is reserved just now."""


class CudaStream(DeviceStream):
    """A CUDA stream of its own, since the default stream cannot be captured."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """See `DeviceStream`."""
        return torch.zeros(num_elements, dtype=dtype, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """See `DeviceStream`; like everything that torch queues, on the current stream, where events are recorded."""
        target.copy_(source, non_blocking=True)

    def record_event(self) -> Event:
        """See `DeviceStream`."""
        return _CudaEvent(torch.cuda.current_stream(self.device).record_event())

    def capture(self, work: Callable[[], None]) -> Graph:
        """See `DeviceStream`."""
        graph = torch.cuda.CUDAGraph()
        # a capture forbids this thread alone what would break it: others may allocate and wait meanwhile
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return _CudaGraph(graph)

    @contextmanager
    def active(self) -> Iterator[None]:
        """See `DeviceStream`; what was queued on the caller's stream comes before, and what it queues then after."""
        callers = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            yield
        callers.wait_stream(self._stream)

    def pool_bytes(self) -> int:
        """See `DeviceStream`."""
        return torch.cuda.memory_reserved(self.device)


class _CudaEvent(Event):
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def synchronize(self) -> None:
        self._event.synchronize()


class _CudaGraph(Graph):
    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph = graph

    def replay(self) -> None:
        self._graph.replay()
