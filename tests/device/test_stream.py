"""`CudaStream` on a torch.cuda that only notes what is queued where: the rules that hold without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from cascade_llm.device.stream import CudaStream


class FakeEvent:
    def __init__(self, queue: list[str], synchronized: list[list[str]]) -> None:
        self._before, self._synchronized = list(queue), synchronized

    def synchronize(self) -> None:
        self._synchronized.append(self._before)


class FakeStream:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.queue: list[str] = []

    def record_event(self) -> FakeEvent:
        return FakeEvent(self.queue, self._cuda.synchronized)

    def wait_stream(self, other: FakeStream) -> None:
        self.queue.append("wait")


class FakeCuda:
    """The caller's stream is the current one, until another is made so."""

    def __init__(self) -> None:
        self.current = FakeStream(self)
        self.synchronized: list[list[str]] = []
        self.captures: list[dict[str, Any]] = []

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextmanager
    def graph(self, graph: Any, **options: Any) -> Iterator[None]:
        self.captures.append(options)
        yield


class FakeTensor:
    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def copy_(self, source: Any, non_blocking: bool) -> None:
        assert non_blocking
        self._cuda.current.queue.append("copy")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(fake))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: fake.current)
    monkeypatch.setattr(torch.cuda, "stream", fake.stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    return fake


def test_an_event_is_recorded_behind_the_copy_inside_active_and_outside(cuda: FakeCuda) -> None:
    stream, target = CudaStream(torch.device("cuda:0")), FakeTensor(cuda)
    for active in (False, True):
        cuda.synchronized.clear()
        if active:
            with stream.active():
                stream.copy(target, None)  # type: ignore[arg-type]
                stream.record_event().synchronize()
        else:
            stream.copy(target, None)  # type: ignore[arg-type]
            stream.record_event().synchronize()
        (waited_for,) = cuda.synchronized
        assert waited_for[-1] == "copy"


def test_other_threads_may_use_the_device_while_one_captures(cuda: FakeCuda) -> None:
    """A request's late capture runs while other threads of the process allocate and wait."""
    stream = CudaStream(torch.device("cuda:0"))
    stream.capture(lambda: None)
    assert cuda.captures[0]["capture_error_mode"] == "thread_local"
