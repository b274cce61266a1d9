"""The real `LLM` on a GPU made of doubles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cascade_llm.llm
from cascade_llm import LLM
from cascade_llm.runner.build import build_runner
from cascade_llm.runner.cuda_graphs import CudaGraphs
from tests.doubles.device import DoubleStream
from tests.doubles.flashinfer import FlashInferDouble
from tests.engine.tiny_llm import tiny_llm
from tests.gpu_path.published_pages import watch_published_pages

__all__ = ["SHAPE", "double_gpu", "gpu_llm", "graphs_of"]

SHAPE = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
"""Of a tiny model that FlashInfer's kernels would serve."""


def double_gpu(*, num_sm: int = 8, exact: bool = True) -> FlashInferDouble:
    """Eight processors: with two KV heads, up to eight tiles are filled by splitting K/V."""
    return FlashInferDouble(DoubleStream(), num_sm=num_sm, exact=exact)


@contextmanager
def on_double(double: FlashInferDouble) -> Iterator[None]:
    """What is built inside takes the double for its GPU."""
    with patch.object(cascade_llm.llm, "build_runner", partial(build_runner, platform=double.platform())):
        yield


def gpu_llm(folder: Path, double: FlashInferDouble, **options: Any) -> LLM:
    """An engine on the double; plans are not checked, since `debug` does without graphs, but every append is."""
    with on_double(double):
        llm = tiny_llm(folder, **{"debug": False, "schedule_lag": 1, **options})
    watch_published_pages(llm, double)
    return llm


def graphs_of(llm: LLM) -> CudaGraphs:
    """The captured graphs of an engine."""
    graphs = llm._engine.runner.graphs
    assert graphs is not None
    return graphs
