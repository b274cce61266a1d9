"""A device stream whose device memory is torch's device "meta": shapes without content.

Nothing is computed, so an engine on it runs in no time and its tokens mean nothing. But host and device are different
devices here, as they are on a GPU and not in `DoubleStream`: what mixes them fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cascade_llm.device.stream import Graph
from tests.doubles.device import DoubleStream
from tests.doubles.planner import DoubleError

__all__ = ["ANY_TOKEN", "MetaStream"]

ANY_TOKEN = 1
"""What every result is; as a flag it says that logits were finite."""


class MetaStream(DoubleStream):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("meta")
        self._is_capturing = False

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if target.shape != source.shape or target.dtype != source.dtype:
            raise DoubleError(f"copy of {source.shape} {source.dtype} to {target.shape} {target.dtype}")
        host, device = (target, source) if source.is_meta else (source, target)
        if not self.is_pinned(host) or not device.is_meta:
            raise DoubleError("a copy needs pinned memory on one side and device memory on the other")
        if source.is_meta:
            target.fill_(ANY_TOKEN)

    def capture(self, work: Callable[[], None]) -> Graph:
        self._is_capturing = True
        try:
            work()
        finally:
            self._is_capturing = False
        return _NoGraph()

    @contextmanager
    def active(self) -> Iterator[None]:
        with _NoMixing():
            yield

    @property
    def capturing(self) -> bool:
        return self._is_capturing

    def is_on_device(self, tensor: torch.Tensor) -> bool:
        return tensor.is_meta

    def enqueue(
        self, run: Callable[[], None], touched: list[torch.Tensor], sources: list[torch.Tensor] | None = None
    ) -> None:
        self.launch(run, touched)

    def launch(self, run: Callable[[], None], touched: list[torch.Tensor]) -> None:
        for tensor in touched:
            if not tensor.is_meta:
                raise DoubleError(f"a kernel is given host memory: {tuple(tensor.shape)}, {tensor.dtype}")


class _NoGraph(Graph):
    def replay(self) -> None:
        return


class _NoMixing(TorchDispatchMode):
    """No operation takes tensors of host and device; numbers of the host are arguments, and may."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
        if len({tensor.device.type for tensor in tensors}) > 1:
            raise DoubleError(f"{func._schema.name} of host and device memory: the host would wait, or the device fail")
        return func(*args, **kwargs)
