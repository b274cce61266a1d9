"""Which device a name means, and which errors mean that a device's memory is full."""

from __future__ import annotations

import errno

import pytest
import torch

from cascade_llm.config import EngineOptions
from cascade_llm.device import devices
from cascade_llm.device.devices import resolve_device, resolve_page_dtype
from cascade_llm.device.start_errors import is_out_of_memory, memory_for
from cascade_llm.errors import CapacityError, ConfigError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.mark.usefixtures("two_gpus")
def test_a_cuda_device_has_its_index_so_that_memory_is_kept_under_one_key() -> None:
    assert torch.device("cuda") != torch.device("cuda:0"), "as keys"
    for name in ("auto", "cuda", "cuda:0"):
        assert resolve_device(name) == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ConfigError, match="torch sees 2 CUDA devices"):
        resolve_device("cuda:2")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),  # a graph that is instantiated
        (torch.AcceleratorError("CUDA error: Out of Memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (CapacityError("the pool is out of memory"), False),
    ],
)
def test_out_of_memory_is_known_by_type_or_words(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
    with pytest.raises(CapacityError if expected else type(error)), memory_for("graphs: lower max_num_seqs"):
        raise error


@pytest.mark.parametrize(
    ("options", "dtype", "device", "stored_type", "pages"),
    [
        ({}, "float32", "cpu", "Q4_1", "float16"),
        ({}, "float32", "cpu", "BF16", "float16"),
        ({}, "float32", "cpu", None, "float16"),
        ({}, "float32", "cpu", "F32", "float32"),
        ({"dtype": "float32"}, "float32", "cpu", "BF16", "float32"),
        ({"kv_cache_dtype": "float32"}, "float32", "cpu", "BF16", "float32"),
        ({"kv_cache_dtype": "int8"}, "float32", "cpu", "F32", "int8"),
        ({}, "bfloat16", "cpu", "Q4_1", "bfloat16"),
        ({}, "float32", "cuda", "BF16", "float32"),
    ],
)
def test_float32_that_nobody_asked_for_has_pages_of_float16(
    options: dict[str, str],
    dtype: str,
    device: str,
    stored_type: str | None,
    pages: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "_cpu_widens_float16", lambda: True)
    found = resolve_page_dtype(EngineOptions(**options), getattr(torch, dtype), torch.device(device), stored_type)
    assert found.dtype == getattr(torch, pages)
    assert found.reason


def test_a_processor_that_cannot_widen_float16_keeps_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_cpu_widens_float16", lambda: False)
    found = resolve_page_dtype(EngineOptions(), torch.float32, torch.device("cpu"), "Q4_1")
    assert found.dtype == torch.float32
    assert "no instruction" in found.reason
