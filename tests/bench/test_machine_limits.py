"""The machine's limits: measured once, kept, measured again when asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cascade_llm.bench import machine_limits as limits_module
from cascade_llm.bench.machine_limits import machine_limits, measure_limits
from tests.native_code import cache_without_measurements

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASCADE_LLM_CACHE", cache_without_measurements(tmp_path / "cache"))
    monkeypatch.setattr(limits_module, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(limits_module, "PRODUCT_SIZES", {"cpu": (32, 64)})
    monkeypatch.setattr(limits_module, "MEASURE_S", 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_are_measured(dtype: torch.dtype) -> None:
    limits = measure_limits(CPU, dtype, num_threads=1)
    assert limits.bytes_per_s > 1e6
    assert limits.flops_per_s > 1e6
    assert limits.linear_flops_per_s == limits.flops_per_s
    assert limits.num_threads == 1
    assert limits.dtype == str(dtype).removeprefix("torch.")


def test_products_with_quantized_weights_have_a_rate_of_their_own() -> None:
    limits = measure_limits(CPU, torch.float32, num_threads=1, with_integers=True)
    assert limits.linear_flops_per_s >= limits.flops_per_s > 1e6


def test_the_best_that_was_seen_is_kept_by_dtype_and_threads(tmp_path: Path) -> None:
    first = machine_limits(CPU, torch.float32, num_threads=1)
    machine_limits(CPU, torch.bfloat16, num_threads=1)
    path = tmp_path / "cache" / "machine_limits.json"
    kept = json.loads(path.read_text())
    assert len(kept) == 2
    (key,) = (key for key in kept if "float32" in key and "bfloat16" not in key)
    path.write_text(json.dumps({key: {**kept[key], "bytes_per_s": 1e30, "flops_per_s": 0.0}}))
    again = machine_limits(CPU, torch.float32, num_threads=1)
    assert again.bytes_per_s == 1e30, "the earlier reading was better"
    assert again.flops_per_s > 0, "the new one was better"
    assert json.loads(path.read_text())[key]["bytes_per_s"] == 1e30
    assert again.device == first.device


@pytest.mark.parametrize("content", ["no json", "[]", "null"])
def test_a_broken_file_is_measured_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "machine_limits.json").write_text(content)
    assert machine_limits(CPU, torch.float32, num_threads=1).flops_per_s > 0


def test_an_entry_of_another_version_is_measured_anew(tmp_path: Path) -> None:
    limits = machine_limits(CPU, torch.float32, num_threads=1)
    path = tmp_path / "cache" / "machine_limits.json"
    (key,) = json.loads(path.read_text())
    path.write_text(json.dumps({key: {"speed": 1}}))
    again = machine_limits(CPU, torch.float32, num_threads=1)
    assert again.device == limits.device


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CASCADE_LLM_CACHE", str(tmp_path / "file"))
    assert machine_limits(CPU, torch.float32, num_threads=1).bytes_per_s > 0
