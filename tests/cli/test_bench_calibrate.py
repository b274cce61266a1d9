"""`bench calibrate` on the demo model's shape, with two trees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade_llm.bench import calibration
from tests.cli.conftest import Run
from tests.native_code import cache_without_measurements

QUICK = ("--seconds", "0.01", "--case", "1,4/64,8", "--case", "2/64", "--attention-backend", "torch")


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Fits to three trees and keeps what it finds in a folder of its own."""
    monkeypatch.setenv("CASCADE_LLM_CACHE", cache_without_measurements(tmp_path / "cache"))
    monkeypatch.setattr(calibration, "FIT_CASES", ("2/64", "1,4/64,8", "1,2,4/32,32,8"))
    return tmp_path / "cache" / "calibration.json"


def test_measures_keeps_and_checks(run: Run, few_cases: Path) -> None:
    done = run("bench", "calibrate", *QUICK, "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["constants"] == "measured now"
    assert report["calibration"]["num_measured"] == 7
    assert report["calibration"]["key"]["num_qo_heads"] == 9
    assert [case["case"] for case in report["check"]["cases"]] == ["1,4/64,8", "2/64"]
    assert few_cases.exists()
    done = run("env")
    assert "calibrated: " in done.stdout
    done = run("bench", "calibrate", *QUICK, "--no-fit")
    assert done.exit_code == 0, done.output
    assert "constants: measured here" in done.stdout
    assert "Regret: " in done.stdout


def test_table_without_keeping(run: Run, few_cases: Path) -> None:
    done = run("bench", "calibrate", *QUICK, "--no-keep", "--no-check")
    assert done.exit_code == 0, done.output
    assert "not kept" in done.stdout
    assert "leaf_bytes_per_s" in done.stdout
    assert not few_cases.exists()


def test_the_flag_of_the_group_is_the_command(run: Run) -> None:
    done = run("bench", "--calibrate", "throughput")
    assert done.exit_code == 2
    assert "takes no other command" in done.stderr
    assert "calibrate" in run("bench").stdout


def test_plot(run: Run, few_cases: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("bench", "calibrate", *QUICK, "--no-fit", "--plot", tmp_path / "check.png")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seconds", "0"), "seconds"),
        (("--no-fit", "--no-check"), "nothing to do"),
        (("--case", "1,2"), "write nodes and tokens"),
        (("--output", "/nowhere/at/all.json"), "cannot be written"),
    ],
)
def test_bad_options(run: Run, arguments: tuple[str, ...], words: str) -> None:
    done = run("bench", "calibrate", *arguments)
    assert done.exit_code == 1
    assert words in done.stderr
