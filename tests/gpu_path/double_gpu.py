"""A GPU made of doubles, and engines that take it for theirs. It imports no transformers, so stages start fast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import cascade_llm.engine.assembly
from cascade_llm.worker.worker import build_worker
from tests.doubles.device import DoubleStream
from tests.doubles.flashinfer import FlashInferDouble

__all__ = ["double_gpu", "on_double"]


def double_gpu(*, num_sm: int = 8, exact: bool = True) -> FlashInferDouble:
    """Eight processors: with two KV heads, up to eight tiles are filled by splitting K/V."""
    return FlashInferDouble(DoubleStream(), num_sm=num_sm, exact=exact)


@contextmanager
def on_double(double: FlashInferDouble) -> Iterator[None]:
    """What is built inside takes the double for its GPU."""
    built = partial(build_worker, platform=double.platform())
    with patch.object(cascade_llm.engine.assembly, "build_worker", built):
        yield
