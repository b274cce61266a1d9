"""A device stream in which nothing is done before somebody waits.

Copies, kernel plans and graph replays are queued, and run at an `Event.synchronize` or when another device operation
needs what they write. So a host buffer that is reused too early, and a result that is read too early, give wrong values
here always, not once in a thousand steps. All memory is the CPU's; what counts as pinned is what `pinned` handed out.

A capture records every aten call and every FlashInfer call with the tensors that they touched. A replay makes these
calls again and runs no Python of the model; it first poisons what other graphs left in the pool that all of them share.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from cascade_llm.device.stream import DeviceStream, Event, Graph
from tests.doubles.planner import DoubleError

__all__ = ["DoubleStream", "poison"]

HOST_READS = (
    "item",
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "_unique2",
    "lift_fresh",
    "equal",
)
"""Operations that make the host wait for the device, or bring pageable memory; a capture fails on them."""
MAY_COPY = ("aten::to", "aten::reshape", "aten::contiguous", "aten::flatten")
"""Operations that give a view where they can."""
INT_POISON = -(1 << 30)


def poison(tensor: torch.Tensor) -> None:
    """Fill with what cannot pass for a result."""
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    elif tensor.dtype == torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(INT_POISON if tensor.dtype in (torch.int32, torch.int64) else 0x5A)


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """Those of an operation's arguments or results, which nest tuples, lists and keyword arguments."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for part in value for tensor in _tensors_in(part)]


def _storages(tensors: list[torch.Tensor]) -> set[int]:
    return {address for tensor in tensors if (address := _storage(tensor))}


def _storage(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # a weight packed by oneDNN has none
        return 0


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    start = tensor.data_ptr()
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (start, start + (extent + 1) * tensor.element_size()) if tensor.numel() else (start, start)


def _overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return a[0] < b[1] and b[0] < a[1]


@dataclass
class _Work:
    run: Callable[[], None]
    touched: set[int]
    """device storages, by address"""
    sources: list[tuple[int, int]] = field(default_factory=list)
    """spans of pinned memory that will be read"""


class DoubleStream(DeviceStream):
    """See the module."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.num_replays = 0
        self.num_copies = 0
        self._queue: deque[_Work] = deque()
        self._num_queued = self._num_run = 0
        self._pinned: dict[int, torch.Tensor] = {}
        self._device_storages: dict[int, torch.Tensor] = {}
        self._graphs: list[_FakeGraph] = []
        self._holding: list[_FakeGraph] = []
        """Graphs whose outputs are not all poisoned: captured or replayed since the last replay of another."""
        self.operations: set[Any] = set()
        """Those that have run: a kernel is loaded by its first call, which must not be in a capture."""
        self._recorder: _Recorder | None = None

    # -- DeviceStream -----------------------------------------------------------------------------------------------

    def pinned(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.zeros(num_elements, dtype=dtype)
        self._pinned[_storage(buffer)] = buffer
        return buffer

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if self.capturing:
            raise DoubleError("a host copy during capture")
        if target.shape != source.shape or target.dtype != source.dtype:
            raise DoubleError(f"copy of {source.shape} {source.dtype} to {target.shape} {target.dtype}")
        from_host, to_host = self.is_pinned(source), self.is_pinned(target)
        if from_host == to_host:
            raise DoubleError("a copy needs pinned memory on one side and device memory on the other")
        self.num_copies += 1
        if to_host:
            with _no_modes():
                poison(target)
            self.enqueue(lambda: _copy(target, source), [source])
        else:
            self._device_storages[_storage(target)] = target
            self.enqueue(lambda: _copy(target, source), [target], [source])

    def record_event(self) -> Event:
        return _DoubleEvent(self, self._num_queued)

    def capture(self, work: Callable[[], None]) -> Graph:
        self.run_queued()
        recorder = _Recorder(self)
        self._recorder = recorder
        try:
            with recorder:
                work()
        finally:
            self._recorder = None
        graph = _FakeGraph(self, recorder)
        self._graphs.append(graph)
        self._holding.append(graph)
        return graph

    @contextmanager
    def active(self) -> Iterator[None]:
        with _StreamMode(self):
            yield

    def pool_bytes(self) -> int:
        return sum(graph.num_bytes for graph in self._graphs)

    # -- for the doubles of FlashInfer ------------------------------------------------------------------------------

    @property
    def capturing(self) -> bool:
        return self._recorder is not None

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return _storage(tensor) in self._pinned

    def is_on_device(self, tensor: torch.Tensor) -> bool:
        """Whether it is memory that a copy went to."""
        return _storage(tensor) in self._device_storages

    def adopt_pinned(self, tensor: torch.Tensor) -> None:
        """Take memory that FlashInfer pins for itself."""
        self._pinned[_storage(tensor)] = tensor

    def enqueue(
        self, run: Callable[[], None], touched: list[torch.Tensor], sources: list[torch.Tensor] | None = None
    ) -> None:
        self._queue.append(_Work(run, _storages(list(touched)), [_span(source) for source in sources or []]))
        self._num_queued += 1

    def launch(self, run: Callable[[], None], touched: list[torch.Tensor]) -> None:
        """A kernel of FlashInfer: recorded in a capture, else run after what is queued."""
        if self._recorder is not None:
            self._recorder.record_kernel(run, touched)
        else:
            self.run_queued()
        with _no_modes():
            run()

    def run_queued(self, up_to: int | None = None) -> None:
        """Do the queued work, in order."""
        if not self._queue:
            return
        with _no_modes():
            while self._queue and (up_to is None or self._num_run < up_to):
                self._queue.popleft().run()
                self._num_run += 1

    def check_host_write(self, tensor: torch.Tensor) -> None:
        """Fail where a queued copy has still to read this pinned memory."""
        span = _span(tensor)
        if any(_overlap(span, source) for work in self._queue for source in work.sources):
            raise DoubleError("a pinned buffer is written while a copy from it is in flight")

    def before_operation(self, arguments: Any) -> None:
        """An eager operation on device memory comes after everything queued that touches it."""
        if self._queue:
            touched = _storages(_tensors_in(arguments)) - self._pinned.keys()
            if any(work.touched & touched for work in self._queue):
                self.run_queued()

    def poison_others(self, running: _FakeGraph) -> None:
        """What graphs allocate is one pool: a replay may write over the outputs of all others."""
        for graph in self._holding:
            if graph is not running:
                for output in graph.private:
                    poison(output)
        self._holding = [running]


class _DoubleEvent(Event):
    def __init__(self, stream: DoubleStream, position: int) -> None:
        self._stream, self._position = stream, position

    def synchronize(self) -> None:
        self._stream.run_queued(self._position)


class _StreamMode(TorchDispatchMode):
    """Watches every operation while the engine works."""

    def __init__(self, stream: DoubleStream) -> None:
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.is_write and isinstance(value, torch.Tensor) and self._stream.is_pinned(value):
                self._stream.check_host_write(value)
        if not func.is_view or func._schema.name in MAY_COPY:  # a view reads nothing
            self._stream.before_operation((args, kwargs))
        if not self._stream.capturing:
            self._stream.operations.add(func)
        return func(*args, **kwargs)


class _Recorder(TorchDispatchMode):
    """Records a capture."""

    def __init__(self, stream: DoubleStream) -> None:
        super().__init__()
        self._stream = stream
        self.records: list[Callable[[], None]] = []
        self.launches: list[str] = []
        """what a device would run, by name: views and allocations are nothing"""
        self.touched: list[torch.Tensor] = []
        self.private: dict[int, torch.Tensor] = {}

    def record_kernel(self, run: Callable[[], None], touched: list[torch.Tensor]) -> None:
        self.records.append(run)
        self.launches.append(run.__qualname__.split(".<locals>")[0])
        self.touched.extend(touched)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = _tensors_in((args, kwargs))
        if name in HOST_READS:
            raise DoubleError(f"{name} during capture: the host would wait, or copy pageable memory")
        if any(self._stream.is_pinned(tensor) for tensor in tensors):
            raise DoubleError(f"{name} touches host memory during capture")
        if name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors[1:2]):
            raise DoubleError(f"{name} by a mask during capture: its size would be read by the host")
        result = func(*args, **kwargs)
        outputs = _tensors_in(result)
        known = _storages(tensors)
        exchanges = func._schema.name.startswith("c10d::")  # their schemas do not say that they write
        writes = exchanges or any(argument.is_write for argument in func._schema.arguments)
        fresh = [output for output in outputs if _storage(output) and _storage(output) not in known]
        for output in fresh:
            self.private[_storage(output)] = output
        self.touched.extend([*tensors, *fresh])
        if writes or (fresh and not name.startswith("empty")):
            if func not in self._stream.operations:
                raise DoubleError(f"{name} runs in a capture first: its kernel would be loaded there")
            self.launches.append(f"aten.{name}")
        if exchanges:
            self.records.append(lambda: _exchange(func, args, kwargs))
        elif writes:
            self.records.append(lambda: func(*args, **kwargs))
        elif fresh and name.startswith("empty"):
            self.records.append(lambda: [poison(output) for output in fresh][-1])
        elif fresh:
            self.records.append(lambda: _recompute(func, args, kwargs, outputs, fresh))
        return result


def _exchange(func: Any, args: Any, kwargs: Any) -> None:
    result = func(*args, **kwargs)
    (result[-1] if isinstance(result, tuple | list) else result).wait()


def _recompute(func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor], fresh: list[torch.Tensor]) -> None:
    again = _tensors_in(func(*args, **kwargs))
    for output, value in zip(outputs, again, strict=True):
        if any(output is one for one in fresh):
            output.copy_(value)


class _FakeGraph(Graph):
    def __init__(self, stream: DoubleStream, recorder: _Recorder) -> None:
        self._stream, self._records, self._touched = stream, recorder.records, recorder.touched
        self.launches = recorder.launches
        self.private = list(recorder.private.values())
        if not self._records:
            raise DoubleError("an empty graph")

    @property
    def num_bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.private)

    def replay(self) -> None:
        self._stream.num_replays += 1
        self._stream.enqueue(self._run, self._touched)

    def _run(self) -> None:
        self._stream.poison_others(self)
        for record in self._records:
            record()


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)


@contextmanager
def _no_modes() -> Iterator[None]:
    with _disable_current_modes(), torch.inference_mode():
        yield
