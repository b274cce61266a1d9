"""What a device or a compiler refuses while an engine starts, as errors that name the cure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cascade_llm.errors import BackendError, CapacityError

__all__ = ["compiled_kernels", "is_out_of_memory", "memory_for"]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no memory left: torch's own error, or what CUDA and the system say in its place."""
    if isinstance(error, CapacityError):
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(known in words for known in OUT_OF_MEMORY_WORDS)


OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory")
"""CUDA's, torch's on the CPU, the system's."""


@contextmanager
def memory_for(what_and_cure: str) -> Iterator[None]:
    """A device without memory left is a `CapacityError` that says for what, and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise CapacityError(f"the device has no memory for {what_and_cure}") from error


@contextmanager
def compiled_kernels() -> Iterator[None]:
    """A kernel that FlashInfer fails to compile on its first use is a `BackendError`."""
    try:
        yield
    except (RuntimeError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and error.filename == "ninja":
            reason = "ninja was not found: activate the environment that FlashInfer is installed in"
        elif str(error).startswith("Ninja build failed"):
            reason = f"`cascade-llm kernels build MODEL` says which and why: ...{str(error)[-500:]}"
        else:
            raise
        raise BackendError(f"a kernel of FlashInfer could not be compiled; {reason}") from error
