"""What a measurement is recorded with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cascade_llm import __version__
from cascade_llm.attention.select import BACKENDS
from cascade_llm.bench.machine import describe_machine
from cascade_llm.layers import native_ops
from cascade_llm.sampling import native_sampler


def test_everything_is_there_and_is_json() -> None:
    machine = json.loads(json.dumps(describe_machine()))
    assert machine["versions"]["cascade-llm"] == __version__
    assert machine["versions"]["torch"] == torch.__version__
    assert 0 < machine["cpu"]["usable_cores"] <= machine["cpu"]["logical_cores"]
    assert machine["cpu"]["torch_threads"] == torch.get_num_threads()
    assert 0 < machine["memory_bytes"]["available"] <= machine["memory_bytes"]["total"]
    assert len(machine["devices"]) == torch.cuda.device_count()
    assert machine["elementwise"]["name"]
    assert machine["sampling"]["name"]


def test_a_backend_serves_or_says_why_not() -> None:
    backends = describe_machine()["backends"]
    assert backends.keys() == BACKENDS.keys()
    assert backends["torch"] is None
    if not torch.cuda.is_available():
        assert str(backends["flashinfer"]).startswith("needs a CUDA GPU")


def test_without_a_compiler_it_says_what_torch_does_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for module in (native_ops, native_sampler):
        module._compiled.cache_clear()
    machine = describe_machine()
    for part in ("elementwise", "sampling"):
        assert machine[part]["name"] == "torch"
        assert "none of gcc, clang, cc was found" in machine[part]["reason"]
