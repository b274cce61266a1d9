"""`models`, and `env --models`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from cascade_llm.models.architectures import ARCHITECTURES
from tests.cli.conftest import Run, process_args
from tests.models.checkpoints import tiny_model


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    for name, architecture in (("org/tiny", "llama"), ("org/odd", "qwen2")):
        repository = tmp_path / "huggingface" / f"models--{name.replace('/', '--')}"
        tiny_model(architecture).save_pretrained(repository / "snapshots" / ("a" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("a" * 40)
    config = tmp_path / "huggingface" / "models--org--odd" / "snapshots" / ("a" * 40) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": ["OddForCausalLM"]}))
    return tmp_path


@pytest.mark.parametrize("as_json", [False, True])
def test_models(cache: Path, repo_root: Path, environment: dict[str, str], as_json: bool) -> None:
    done = subprocess.run(
        process_args("models", *(["--json"] if as_json else [])),
        cwd=repo_root,
        env={
            **environment,
            "HF_HUB_CACHE": str(cache / "huggingface"),
            "MODELSCOPE_CACHE": str(cache / "modelscope"),
            "MODELSCOPE_HOME": str(cache / "home"),
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    if as_json:
        reports = {report["model"]: report for report in json.loads(done.stdout)}
        assert reports["org/tiny"]["reason"] is None
        assert reports["org/tiny"]["weights_bytes"] > 0
        assert "OddForCausalLM is not implemented" in reports["org/odd"]["reason"]
    else:
        lines = {line.split()[0]: line for line in done.stdout.splitlines()}
        assert "LlamaForCausalLM  yes" in lines["org/tiny"]
        assert "OddForCausalLM    no" in lines["org/odd"]
        assert "OddForCausalLM is not implemented" in lines["org/odd:"]


def test_env_models(run: Run) -> None:
    rows = json.loads(run("env", "--models", "--json").stdout)
    text = run("env", "--models").stdout
    for name, architecture in ARCHITECTURES.items():
        words = next(line.split() for line in text.splitlines() if line.split()[:1] == [name])
        assert words[1].rstrip(";") == architecture.hf_class
    for row in rows:
        begins = [row["container"], *row["type"].split()]
        assert any(line.split()[: len(begins)] == begins for line in text.splitlines()), row["type"]
    assert "not read" in text
