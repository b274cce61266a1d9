"""Which device and dtype a model runs in, and with how many threads."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from cascade_llm.config import EngineOptions
from cascade_llm.device.cpu_cores import usable_cores
from cascade_llm.device.cpu_levels import levels_to_try
from cascade_llm.errors import ConfigError

__all__ = [
    "PageDtype",
    "compute_capability",
    "resolve_device",
    "resolve_dtype",
    "resolve_page_dtype",
    "thread_count",
    "thread_limit",
]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KV_DTYPES = {**DTYPES, "fp8_e4m3": torch.float8_e4m3fn, "int8": torch.int8}
"""Of pages."""


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one. Raises `ConfigError` for one that is not there.

    A CUDA device has its index: "cuda" and "cuda:0" are different keys to torch, and the same memory.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}: it must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices: use cpu")
    if name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of a CUDA device; None of others."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def resolve_dtype(name: str, checkpoint_dtype: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in. `auto`: bfloat16 on a CPU that multiplies it, float32 on others, the model's on CUDA."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if checkpoint_dtype == "float32" else DTYPES[checkpoint_dtype]
    return torch.bfloat16 if _cpu_has_bfloat16() else torch.float32


class PageDtype(NamedTuple):
    """What K and V are stored in, and why."""

    dtype: torch.dtype
    reason: str


def resolve_page_dtype(
    options: EngineOptions, dtype: torch.dtype, device: torch.device, stored_type: str | None
) -> PageDtype:
    """What K and V are stored in.

    `auto` is what the model computes in. Where that is float32 for want of bfloat16 products only, and not asked for,
    it is float16 on processors that widen it as they read; decision 0043 has what it costs.

    Args:
        options: the user's
        dtype: that the model computes in
        device: where it does
        stored_type: that most of the checkpoint's weights have in its files, `Checkpoint.main_type`
    """
    if options.kv_cache_dtype != "auto":
        return PageDtype(KV_DTYPES[options.kv_cache_dtype], "as kv_cache_dtype says")
    if device.type != "cpu" or dtype != torch.float32 or options.dtype != "auto":
        return PageDtype(dtype, "as the model computes")
    if stored_type in ("F32", "F64"):
        return PageDtype(dtype, "the checkpoint's own values are float32")
    if not _cpu_widens_float16():
        return PageDtype(dtype, "the processor has no instruction that widens float16")
    return PageDtype(torch.float16, "half the bytes of float32, which kv_cache_dtype='float32' keeps")


def thread_count(num_threads: int | None) -> int:
    """Threads of a step: as asked; None is torch's own number, but no more than the cores that this process has."""
    return num_threads or min(torch.get_num_threads(), _cores_at_start())


@contextmanager
def thread_limit(num_threads: int | None) -> Iterator[None]:
    """Run with `thread_count` threads and restore the process's number: it belongs to the user."""
    before, num_threads = torch.get_num_threads(), thread_count(num_threads)
    if num_threads == before:
        yield
        return
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _cores_at_start() -> int:
    """A step asks, so the system is asked once."""
    return usable_cores()


def _cpu_widens_float16() -> bool:
    return any("f16c" in level.flags for level in levels_to_try())


def _cpu_has_bfloat16() -> bool:
    return any("avx512_bf16" in level.flags for level in levels_to_try())
