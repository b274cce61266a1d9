"""The machine of the GPU suite where there is no GPU: the doubles, in bfloat16 as on a GPU, with a stopwatch."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import cascade_llm.engine.assembly
from cascade_llm import LLM
from cascade_llm.attention.flashinfer.backend import GpuPlatform
from scripts.gpu_suite.machine import Card, Machine, Replay
from scripts.gpu_suite.sizes import DRY
from tests.doubles import device
from tests.doubles.flashinfer import ARCH
from tests.doubles.torch_products import cuda_products
from tests.gpu_path.double_gpu import double_gpu, on_double
from tests.gpu_path.rank_executor import RankThreads

__all__ = ["DoubleMachine"]


class DoubleMachine(Machine):
    """Runs what is small enough for it, whatever is asked."""

    device, dtype, sizes = torch.device("cpu"), torch.bfloat16, DRY
    card = Card("double", 1e10, 1e11, 1 << 16)
    memory_bytes = 1 << 30
    arch = ARCH
    num_devices = 2

    def __init__(self) -> None:
        """torch's CUDA products are there as long as the machine."""
        products = ExitStack()
        products.enter_context(cuda_products())
        weakref.finalize(self, products.close)

    def platform(self) -> GpuPlatform:
        return double_gpu(exact=False).platform()

    def llm(self, config: Path, **options: Any) -> LLM:
        """Ranks are threads."""
        ranks = patch.object(cascade_llm.engine.assembly, "ProcessExecutor", RankThreads)
        with on_double(double_gpu(exact=False)), ranks:
            return LLM(config, load_format="dummy", device="cpu", dtype="bfloat16", **options)

    def seconds(self, work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    @contextmanager
    def replays(self) -> Iterator[Callable[[], list[Replay]]]:
        """When the queue got to them."""
        found: list[Replay] = []
        original, started = device._FakeGraph._run, time.perf_counter()

        def run(graph: Any) -> None:
            begin = time.perf_counter() - started
            original(graph)
            found.append(Replay(begin, time.perf_counter() - started))

        with patch.object(device._FakeGraph, "_run", run):
            yield lambda: found

    def synchronize(self) -> None:
        return
