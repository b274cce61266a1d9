"""Measured constants come back for what they were measured for, and for nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from cascade_llm.scheduler.cascade.calibration import Calibration, CalibrationKey, read_calibration, write_calibration
from cascade_llm.scheduler.cascade.device_costs import DEVICE_COSTS

KEY = CalibrationKey(
    device="A processor",
    num_threads=2,
    backend="torch",
    dtype="bfloat16",
    num_qo_heads=9,
    num_kv_heads=3,
    head_dim=64,
    torch_version="2.13.0",
)
CALIBRATION = Calibration(
    key=KEY,
    costs=replace(DEVICE_COSTS["cpu"], level_s=0.0, cached_bytes_per_s=float("inf")),
    median_error=0.07,
    worst_error=0.3,
    num_measured=40,
    measured_at="2026-11-20T10:00:00+00:00",
)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "calibration.json"
    write_calibration(path, CALIBRATION)
    assert read_calibration(path, KEY) == (
        CALIBRATION,
        "measured here at 2026-11-20T10:00:00+00:00, median error 7%",
    )
    assert [entry.name for entry in path.parent.iterdir()] == ["calibration.json"]


def test_a_second_one_for_the_same_replaces_the_first(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    other = replace(CALIBRATION, key=replace(KEY, num_threads=4))
    for calibration in (CALIBRATION, other, replace(CALIBRATION, median_error=0.01)):
        write_calibration(path, calibration)
    assert len(json.loads(path.read_text())["calibrations"]) == 2
    found, _ = read_calibration(path, KEY)
    assert found is not None
    assert found.median_error == 0.01
    assert read_calibration(path, other.key)[0] == other


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "Another"}, "device A processor there, Another here"),
        ({"num_threads": 1}, "num_threads 2 there, 1 here"),
        ({"backend": "native", "head_dim": 128}, "backend torch there, native here, head_dim 64 there, 128 here"),
    ],
)
def test_another_machine_s_is_not_used(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(path, CALIBRATION)
    found, reason = read_calibration(path, replace(KEY, **change))  # type: ignore[arg-type]
    assert found is None
    assert words in reason
    assert "bench calibrate" in reason


def test_without_a_file(tmp_path: Path) -> None:
    found, reason = read_calibration(tmp_path / "none.json", KEY)
    assert found is None
    assert reason == "not calibrated on this machine (cascade-llm bench calibrate)"


def broken_files() -> list[tuple[str, str]]:
    good = {"format": 1, "calibrations": []}
    entry = {
        "key": {**vars_of(KEY)},
        "costs": vars_of(CALIBRATION.costs),
        "median_error": 0.1,
        "worst_error": 0.1,
        "num_measured": 1,
        "measured_at": "",
    }
    costs = entry["costs"]
    assert isinstance(costs, dict)
    return [
        ("{", "Expecting"),
        ("[]", "format 1"),
        (json.dumps({**good, "format": 2}), "format 1"),
        (json.dumps({"format": 1}), "calibrations"),
        (json.dumps({**good, "calibrations": [{**entry, "costs": {**costs, "level_s": -1}}]}), "level_s is -1"),
        (json.dumps({**good, "calibrations": [{**entry, "costs": {**costs, "tile_rows": 0}}]}), "tile_rows is 0"),
        (json.dumps({**good, "calibrations": [{**entry, "costs": {**costs, "level_s": "fast"}}]}), "'fast'"),
        (json.dumps({**good, "calibrations": [{**entry, "costs": {"a": 1}}]}), "a"),
        (json.dumps({**good, "calibrations": [{**entry, "key": {}}]}), "missing"),
        (json.dumps({**good, "calibrations": [{**entry, "median_error": "small"}]}), "median_error is 'small'"),
        (json.dumps({**good, "calibrations": [{**entry, "costs": {**costs, "level_s": 10**400}}]}), "level_s is 1000"),
        (json.dumps({**good, "calibrations": [{**entry, "costs": {**costs, "level_s": math.inf}}]}), "level_s is inf"),
        (json.dumps({**good, "calibrations": [None]}), "NoneType"),
        (json.dumps({**good, "calibrations": {"a": 1}}), "string indices"),
        ("[" * 100_000, "recursion"),
    ]


def vars_of(record: object) -> dict[str, object]:
    return dict(vars(record))


@pytest.mark.parametrize(("text", "words"), broken_files())
def test_a_broken_file_is_named_ignored_and_replaced(
    tmp_path: Path, text: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    found, reason = read_calibration(path, KEY)
    assert found is None
    assert str(path) in reason
    assert words in reason
    assert reason in caplog.text
    write_calibration(path, CALIBRATION)
    assert read_calibration(path, KEY)[0] == CALIBRATION
