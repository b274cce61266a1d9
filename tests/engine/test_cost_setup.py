"""An engine plans with constants that were measured for it, and says where they come from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.device.user_cache import cache_folder
from cascade_llm.engine import cost_setup
from cascade_llm.llm import LLM
from cascade_llm.scheduler.cascade.calibration import Calibration, write_calibration
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS, DeviceCosts
from tests.engine.tiny_llm import save_tiny

SPEC = AttentionSpec(
    num_layers=2,
    num_qo_heads=4,
    num_kv_heads=2,
    head_dim=16,
    sm_scale=0.25,
    dtype=torch.float32,
    device=torch.device("cpu"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("CASCADE_LLM_CACHE", str(tmp_path))
    return tmp_path


def keep(costs: DeviceCosts, spec: AttentionSpec, backend: str) -> None:
    calibration = Calibration(
        key=cost_setup.calibration_key(spec, backend),
        costs=costs,
        median_error=0.05,
        worst_error=0.2,
        num_measured=9,
        measured_at="2026-11-20",
    )
    write_calibration(cost_setup.calibration_path(), calibration)


def test_the_table_serves_until_something_was_measured(folder: Path) -> None:
    model, source = cost_setup.choose_cost_model(SPEC, "torch")
    assert model.costs == DEVICE_COSTS["cpu"]
    assert model.shape.kv_bytes_per_token == 2 * 2 * 16 * 4
    assert source == "table entry 'cpu'; not calibrated on this machine (cascade-llm bench calibrate)"
    costs = replace(DEVICE_COSTS["cpu"], level_s=0.25)
    keep(costs, SPEC, "torch")
    model, source = cost_setup.choose_cost_model(SPEC, "torch")
    assert model.costs == costs
    assert source == "measured here at 2026-11-20, median error 5%"
    for spec, backend, threads in (
        (SPEC, "native", None),
        (replace(SPEC, head_dim=32), "torch", None),
        (SPEC, "torch", torch.get_num_threads() + 1),
    ):
        model, source = cost_setup.choose_cost_model(spec, backend, num_threads=threads)
        assert model.costs == DEVICE_COSTS["cpu"]
        assert "calibrated for something else" in source


def test_a_broken_file_does_not_stop_an_engine(folder: Path) -> None:
    cost_setup.calibration_path().write_text("{")
    model, source = cost_setup.choose_cost_model(SPEC, "torch")
    assert model.costs == DEVICE_COSTS["cpu"]
    assert "cannot be used" in source
    assert "cannot be used" in cost_setup.describe_calibrations()[0]


def test_what_env_shows(folder: Path) -> None:
    assert cost_setup.describe_calibrations() == ["not calibrated on this machine (cascade-llm bench calibrate)"]
    keep(DEVICE_COSTS["cpu"], SPEC, "torch")
    (line,) = cost_setup.describe_calibrations()
    assert line.startswith("calibrated: ")
    assert "4/2 heads of 16" in line
    text = cost_setup.calibration_path().read_text()
    cost_setup.calibration_path().write_text(text.replace(torch.__version__, "0.1"))
    (line,) = cost_setup.describe_calibrations()
    assert line.startswith("not used: calibrated elsewhere")


def test_an_engine_decides_by_what_was_measured(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = save_tiny(tmp_path_factory.mktemp("tiny"))
    reasons = []
    for level_s in (0.0, 1e3):
        with LLM(model, attention_backend="torch", dtype="float32", kv_cache_bytes=1 << 22) as probe:
            spec = probe.engine.executor.runner.backend.spec
        keep(replace(DEVICE_COSTS["cpu"], level_s=level_s, segment_s=0.0), spec, "torch")
        with LLM(model, attention_backend="torch", dtype="float32", kv_cache_bytes=1 << 22) as llm:
            assert llm.cost_source == "measured here at 2026-11-20, median error 5%"
            llm.generate([[*range(1, 80), 80 + own] for own in range(8)])
            reasons.append(llm.plan_report()["last_step"]["reason"])
    assert reasons == [None, "the cost model expects no gain"]


def test_where_measurements_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_LLM_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere")
    monkeypatch.delenv("CASCADE_LLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == Path("/caches/cascade-llm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "cascade-llm"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "cascade-llm"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache_folder() == Path("/local/cascade-llm")
