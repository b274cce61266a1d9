"""`cascade-llm bench`: tables, JSON, files and charts of a tiny model, and what is refused before the work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade_llm.bench.workloads import WORKLOADS
from cascade_llm.cli.bench import PLACES
from tests.bench.fake_openai_server import fake_openai_server
from tests.cli.conftest import Run
from tests.engine.tiny_llm import save_tiny
from tests.native_code import cache_without_measurements

SMALL = ("--prefix-len", "40", "--num-requests", "4", "--suffix-len", "4", "--output-len", "6", "--repeat", "1")
ENGINE = ("--page-size", "4", "--cascade-shared-prefix-len", "8", "--dtype", "float32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_LLM_CACHE", cache_without_measurements(tmp_path_factory.mktemp("cache")))
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


CHAT = ("--conversations", "2", "--turns", "2", "--system-len", "8", "--user-len", "4", "--output-len", "4")


def test_latency_of_conversations(run: Run, tiny: Path) -> None:
    args = ("bench", "latency", "chat", "-m", tiny, *CHAT, *ENGINE, "--think-s", "0.01", "--request-rate", "500")
    printed = json.loads(run(*args, "--repeat", "1", "--json").stdout)
    assert printed["load"]["history"] == "real"
    assert printed["ratio"]["cascade off"]["e2e"].keys() == {"mean", "p50", "p90", "p99"}


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


def test_attention_times_trees(run: Run, tmp_path: Path) -> None:
    args = ("bench", "attention", "--tree", "1,4/64,16", "--heads", "4/2", "--heads", "2/2", "--head-dim", "16")
    fast = ("--measure-s", "0", "--num-threads", "1", "--dtype", "float32")
    result = run(*args, *fast, "--plot", tmp_path / "trees.png")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("1,4/64,16") == 2
    assert "cost model: table entry 'cpu'" in " ".join(result.stdout.split())
    printed = json.loads(run(*args, *fast, "--json").stdout)
    assert [row["heads"] for row in printed["results"]] == ["4/2", "2/2"]
    assert "no tree" in run("bench", "attention", "--tree", "4,x").stderr


def test_serve_measures_a_server(run: Run, tmp_path: Path) -> None:
    args = ("bench", "serve", "shared-prefix", *SMALL, "--repeat", "2", "--plot", tmp_path / "serve.png")
    with fake_openai_server(behaviour="fails every third") as fake, fake_openai_server(behaviour="well") as other:
        paces = ("--concurrency", "2", "--concurrency", "1", "--slo-ttft", "60000")
        result = run(*args, "--url", fake.url, "--against", other.url, *paces, "--json")
        assert result.exit_code == 0, result.stderr
        printed = json.loads(result.stdout)
        assert [report["arrivals"]["users"] for report in printed["reports"]] == [2, 1]
        for server, num_failed in ((fake.url, 5), (other.url, 0)):
            counters = [one["counters"] for report in printed["reports"] for one in report["runs"][server]]
            assert [count["requests"] for count in counters] == [4] * 4
            assert sum(count["failed"] for count in counters) == num_failed
            assert all(count["requests"] - count["failed"] == count["in_time"] for count in counters)
        assert len(printed["errors"]) == 5
        prompts = [[tuple(body["prompt"]) for body in server.bodies] for server in (fake, other)]
        assert sorted(prompts[0]) == sorted(prompts[1])
        assert len(set(prompts[0])) == len(prompts[0])
    with fake_openai_server() as fake:
        chat = ("bench", "serve", "chat", *CHAT, "--think-s", "0.01", "--repeat", "1", "--url", fake.url)
        assert "--history recorded" in " ".join(run(*chat).stderr.split())
        result = run(*chat, "--history", "recorded", "--request-rate", "500")
        assert result.exit_code == 0, result.stderr
        assert "500 a second" in " ".join(result.stdout.split())
    with fake_openai_server(behaviour="refuses") as fake:
        result = run(*args, "--force", "--url", fake.url)
        assert result.exit_code == 1
        assert "no request succeeded" in result.stderr


def test_help_of_every_command_imports_nothing_heavy(run_python: Callable[[str], str]) -> None:
    paths = [("bench", name) for name in PLACES]
    paths += [("bench", "throughput", name) for name in WORKLOADS]
    printed = run_python(
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from cascade_llm.cli.main import cli\n"
        f"codes = [CliRunner().invoke(cli, [*path, '--help']).exit_code for path in {paths!r}]\n"
        "print(json.dumps([codes, sorted(sys.modules)]))"
    )
    codes, modules = json.loads(printed)
    assert codes == [0] * len(paths)
    assert not {"torch", "numpy", "matplotlib", "transformers", "psutil"} & set(modules)


@pytest.mark.parametrize(
    ("args", "cure"),
    [
        (("serve", "random", "--url", "http://localhost:abc"), "write it as http://localhost:8000"),
        (("serve", "random", "--vocab-size", "0"), "0 is not in the range x>=1"),
        (
            ("throughput", "random", "--output", "both.png", "--plot", "both.png"),
            "named twice: give each file a name of its own",
        ),
        (("calibrate", "--seconds", "nan"), "seconds"),
        (("attention", "--measure-s", "-1"), "-1.0 is not in the range x>=0"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(run: Run, args: tuple[str, ...], cure: str) -> None:
    result = run("bench", *args)
    assert result.exit_code in (1, 2)
    assert cure in " ".join(result.stderr.split())
