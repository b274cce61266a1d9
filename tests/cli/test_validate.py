"""`cascade-llm validate`: table, JSON, verdict and exit status."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.engine.tiny_llm import tiny_llm
from tests.plan_file.recordings import edit
from tests.validation.faults import ForgetsALevel, install


@pytest.fixture
def recording(tiny_folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "plans.gz"
    with tiny_llm(tiny_folder, record_plans=path, record_token_ids=True, max_model_len=128) as llm:
        llm.generate([[*range(3, 40), i] for i in range(5)])
    return path


@pytest.mark.slow
def test_quick_prints_a_table_and_a_verdict(run: Run, tiny_folder: Path) -> None:
    result = run("validate", tiny_folder, "--quick", "--dtype", "float32", "--attention-backend", "torch")
    assert result.exit_code == 0, result.output
    assert "engine against itself" in result.stdout
    assert "Validation passed: " in result.stdout.splitlines()[-1]


def test_a_recording_is_replayed_without_and_with_its_model(run: Run, tiny_folder: Path, recording: Path) -> None:
    result = run("validate", "--replay", recording)
    assert result.exit_code == 0, result.output
    assert "recorded plans against" in result.stdout
    assert "Validation passed: " in result.stdout.splitlines()[-1]
    result = run("validate", tiny_folder, "--replay", recording, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"] is True
    assert [section["title"] for section in report["sections"]] == ["attention on random K and V", "engine"]


def test_a_failed_validation_has_exit_status_1(run: Run, recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ForgetsALevel)
    result = run("validate", "--replay", recording, "--attention-backend", "torch")
    assert result.exit_code == 1
    assert "Validation failed: 1 passed, 2 failed" in result.stdout


def test_a_wrong_file_is_one_line_with_the_cure(run: Run, recording: Path) -> None:
    edit(recording, 2, lambda step: replace(step, slots=step.slots[1:]))
    result = run("validate", "--replay", recording)
    assert result.exit_code == 1
    assert "plans.gz, frame 2: columns over rows differ in length" in result.stderr
    assert "the file was edited or damaged, record it again" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "give a MODEL"),
        (["smollm2", "--max-steps", "3"], "--max-steps and --allow-truncated are for --replay"),
        (["smollm2", "--allow-truncated"], "--max-steps and --allow-truncated are for --replay"),
        (["--replay", "x", "--max-steps", "0"], "--max-steps"),
        (["smollm2", "--max-num-seqs", "3"], "No such option"),
    ],
)
def test_a_wrong_command_line(run: Run, args: list[str], words: str) -> None:
    result = run("validate", *args)
    assert result.exit_code == 2
    assert words in result.stderr
