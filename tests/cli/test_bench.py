"""`cascade-llm bench`: tables, JSON, files and charts of a tiny model, and what is refused before the work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade_llm.bench.workloads import WORKLOADS
from tests.cli.conftest import Run
from tests.engine.tiny_llm import save_tiny

SMALL = ("--prefix-len", "40", "--num-requests", "4", "--suffix-len", "4", "--output-len", "6", "--repeat", "1")
ENGINE = ("--page-size", "4", "--cascade-shared-prefix-len", "8", "--dtype", "float32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_LLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_throughput_prints_speeds_ratios_limit_and_savings(run: Run, tiny: Path) -> None:
    result = run("bench", "throughput", "shared-prefix", "-m", tiny, *SMALL, *ENGINE)
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    for words in ("cascade on is", "limit:", "GFLOP/s", "steps shared prefixes", "a warm step", "enable_cascade_att"):
        assert words in text


def test_throughput_writes_json_and_a_chart(run: Run, tiny: Path, tmp_path: Path) -> None:
    output, plot = tmp_path / "result.json", tmp_path / "result.png"
    args = ("bench", "throughput", "shared-prefix", "-m", tiny, *SMALL, *ENGINE, "--output", output, "--plot", plot)
    result = run(*args, "--json", "--no-parts")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(output.read_text())
    assert plot.read_bytes().startswith(b"\x89PNG")
    again = run(*args)
    assert again.exit_code == 1
    assert "exists: give another name, or --force" in " ".join(again.stderr.split())


def test_latency_prints_and_draws(run: Run, tiny: Path, tmp_path: Path) -> None:
    plot = tmp_path / "latency.svg"
    args = ("bench", "latency", "shared-prefix", "-m", tiny, *SMALL, *ENGINE, "--plot", plot, "--request-rate", "500")
    result = run(*args)
    assert result.exit_code == 0, result.stderr
    assert "time to first token" in result.stdout
    assert "500 requests a second" in result.stdout
    assert "<svg" in plot.read_text()
    printed = json.loads(run(*args[:-2], "--force", "--concurrency", "2", "--json").stdout)
    assert printed["arrivals"] == {"kind": "AtConcurrency", "users": 2}


@pytest.mark.parametrize("command", ["throughput", "latency"])
def test_every_workload_is_a_command_with_its_options(run: Run, command: str) -> None:
    listed = run("bench", command, "--help").stdout
    for name, workload in WORKLOADS.items():
        assert name in listed
        text = run("bench", command, name, "--help").stdout
        for field in workload.__dataclass_fields__:  # type: ignore[attr-defined]
            if field not in ("name", "temperature"):
                assert f"--{field.replace('_', '-')}" in text


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("throughput", "shared-prefix", "--prefix-len", "300"), "the context holds 256"),
        (("throughput", "shared-prefix", "--plot", "x.gif"), "no known kind"),
        (("throughput", "shared-prefix", "--plot", "no/such/folder.png"), "a folder that exists"),
        (("throughput", "shared-prefix", "--device", "cuda:9"), "CUDA devices"),
        (("throughput", "shared-prefix", "--against", "vlm", "--prefix-len", "8"), "did you mean 'vllm'?"),
        (("throughput", "shared-prefix", "--against", "vllm", "--prefix-len", "8"), "--install-peer"),
        (
            (
                "throughput",
                "chat",
                "--against",
                "vllm",
                "--system-len",
                "8",
                "--user-len",
                "8",
                "--turns",
                "2",
                "--output-len",
                "4",
            ),
            "turns",
        ),
        (("latency", "shared-prefix", "--request-rate", "0"), "above 0"),
        (("throughput", "file"), "--file"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(run: Run, tiny: Path, args: tuple[str, ...], words: str) -> None:
    result = run("bench", *args, "-m", tiny)
    assert result.exit_code == 1
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_a_wrong_workload_is_answered_with_the_nearest(run: Run) -> None:
    assert "did you mean 'forest'?" in run("bench", "throughput", "forrest").stderr
    result = run("bench", "latency", "random", "--request-rate", "1", "--concurrency", "1")
    assert "exclude each other" in result.stderr
