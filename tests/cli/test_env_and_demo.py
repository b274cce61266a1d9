"""`env` and `demo`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from cascade_llm.attention.flashinfer.kernels import kernel_folder
from cascade_llm.cli.demo import QUESTIONS, demo_conversations, demo_system_prompt
from cascade_llm.engine.tokenizer import load_tokenizer
from cascade_llm.loader.resolve import open_checkpoint
from tests.cli.conftest import Run, RunProcess
from tests.engine.tiny_llm import save_tiny


def test_env(run: Run) -> None:
    record = json.loads(run("env", "--json").stdout)
    text = run("env").stdout
    for package, version in record["versions"].items():
        assert re.search(rf"^{re.escape(package)} +{re.escape(version or 'not installed')} *$", text, re.MULTILINE)
    assert re.search(r"^backend torch +usable", text, re.MULTILINE)
    assert re.search(r"^backend flashinfer +(not )?usable", text, re.MULTILINE)
    assert re.search(r"^sampling +(native|torch \()", text, re.MULTILINE)


def test_env_tells_which_kernels_are_missing(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASCADE_LLM_CACHE", str(tmp_path / "cache"))
    model = save_tiny(tmp_path / "model", "qwen3", head_dim=128)
    folder = kernel_folder("9.0a")
    for name in ("cascade", "page"):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.so").write_bytes(b"code")
    record = json.loads(run("env", "--model", model, "--json").stdout)["kernels"]
    states = {module["name"]: module["state"] for module in record["modules"]}
    assert {name for name, state in states.items() if state == "built"} == {"cascade", "page"}
    assert len(states) == 6
    assert [name for name in states if "head_dim_qk_128" in name and states[name] == "missing"]
    assert "2 of 6" in " ".join(run("env", "--model", model).stdout.split())
    assert "kernels build" in run("env", "--model", model).stdout


def test_the_demo_s_prompt_is_long_and_its_questions_differ() -> None:
    tokenizer = load_tokenizer(open_checkpoint("smollm2").tokenizer_source)
    assert tokenizer is not None
    assert len(tokenizer.encode(demo_system_prompt())) >= 1500
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 16
    assert [messages[1]["content"] for messages in demo_conversations()] == list(QUESTIONS)


@pytest.mark.slow
def test_the_demo_runs(run_process: RunProcess) -> None:
    done = run_process("demo", "--repeat", "1")
    assert done.returncode == 0, done.stderr
    assert "24 sequences  level 0" in done.stdout
    assert "Perihelion" in done.stdout
    rows = re.findall(r"│ (on|off) +│ (cold|warm) +│", done.stdout)
    assert rows == [("on", "cold"), ("on", "warm"), ("off", "cold"), ("off", "warm")]
    assert re.search(r"\d+ of 24 answers have the same tokens", done.stdout)
