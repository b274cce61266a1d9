"""`cascade-llm bench`: tables, JSON, files and charts of a tiny model, and what is refused before the work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascade_llm.bench.workloads import WORKLOADS
from cascade_llm.cli.bench import PLACES
from tests.bench.fake_openai_server import fake_openai_server
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


CHAT = ("--conversations", "2", "--turns", "2", "--system-len", "8", "--user-len", "4", "--output-len", "4")


def test_latency_compares_with_another_engine_in_conversations(run: Run, tiny: Path) -> None:
    args = ("bench", "latency", "chat", "-m", tiny, *CHAT, *ENGINE, "--think-s", "0.01", "--request-rate", "500")
    result = run(*args, "--no-off", "--repeat", "1", "--against", "transformers", "--history", "recorded")
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "times as long as cascade on" in text
    assert "all that has arrived" in text, "the other engine's flags"
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
        (("throughput", "shared-prefix", "--against", "vlm", "--prefix-len", "8"), "did you mean 'vllm'?"),
        (("throughput", "shared-prefix", "--against", "vllm", "--prefix-len", "8"), "--install-peer"),
        (("latency", "shared-prefix", "--against", "vllm", "--prefix-len", "8"), "--install-peer"),
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


def test_growth_measures_every_point_once(run: Run, tiny: Path, tmp_path: Path) -> None:
    points = ("--batches", "1,3", "--at-prefix", "16", "--prefix-lens", "0,16", "--at-batch", "3")
    small = ("--suffix-len", "4", "--output-len", "4", "--repeat", "1", "--plot", tmp_path / "growth.png")
    result = run("bench", "growth", "-m", tiny, *points, *small, *ENGINE, "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)["points"]
    assert list(measured) == ["1 x 16", "3 x 16", "3 x 0"]
    for point in measured.values():
        assert point["planning_s"].keys() == point["share_of_limit"].keys() == {"cascade on", "cascade off"}
        assert 0 < point["planning_s"]["cascade on"] < point["step_s"]["cascade on"]
    assert [point["has_equal_plans"] for point in measured.values()] == [True, False, True]
    assert "3 sequences, 16 shared tokens:" in result.stderr, "each point is told as it comes"
    assert (tmp_path / "growth.png").exists()
    assert "write integers" in run("bench", "growth", "-m", tiny, "--batches", "1,two").stderr


def test_growth_keeps_points_and_goes_on_from_a_file(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade_llm.bench import setup

    opened: list[str] = []
    open_llm = setup.LLM

    def counted(*args: Any, **options: Any) -> Any:
        opened.append("engine")
        return open_llm(*args, **options)

    output = tmp_path / "growth.json"
    args = ("bench", "growth", "-m", tiny, "--prefix-lens", "0,16", "--at-batch", "2", "--at-prefix", "8", *ENGINE)
    args = (*args, "--suffix-len", "4", "--repeat", "1", "--output", output)
    first = run(*args, "--batches", "1", "--output-len", "6")
    assert first.exit_code == 0, first.stderr
    written = json.loads(output.read_text())["points"]
    assert list(written) == ["1 x 8", "2 x 0", "2 x 16"]
    monkeypatch.setattr(setup, "LLM", counted)
    second = run(*args, "--batches", "1,3,4", "--output-len", "6", "--resume")
    assert second.exit_code == 0, second.stderr
    resumed = json.loads(output.read_text())["points"]
    assert {name: resumed[name] for name in written} == written
    assert resumed.keys() - written.keys() == {"3 x 8", "4 x 8"}
    assert opened == ["engine"] * 2, "one with cascade attention and one without, for all points"
    assert "exists" in run(*args, "--batches", "1").stderr
    assert "another output_len" in run(*args, "--batches", "1", "--resume").stderr
    output.write_text("[]")
    assert "does not hold results" in run(*args, "--batches", "1", "--resume").stderr
    assert "--resume needs --output" in run("bench", "growth", "--resume").stderr


def test_growth_shows_and_keeps_what_an_interruption_left(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade_llm.bench import growth

    finish = growth.growth_result

    def interrupted(point: growth.GrowthPoint, report: Any) -> growth.GrowthResult:
        if point.batch == 2:
            raise KeyboardInterrupt
        return finish(point, report)

    monkeypatch.setattr(growth, "growth_result", interrupted)
    output, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    args = ("--batches", "1,2", "--prefix-lens", "8", "--at-batch", "1", "--at-prefix", "8", "--output-len", "6")
    result = run("bench", "growth", "-m", tiny, *args, *ENGINE, "--repeat", "1", "--output", output, "--plot", plot)
    assert result.exit_code != 0
    assert "1 of 2 points: --resume measures the others" in " ".join(result.stderr.split())
    assert list(json.loads(output.read_text())["points"]) == ["1 x 8"]
    assert plot.exists()
    assert "equal plans" in " ".join(result.stdout.replace("│", " ").split())


def test_serve_measures_a_server(run: Run, tmp_path: Path) -> None:
    args = ("bench", "serve", "shared-prefix", *SMALL, "--repeat", "2", "--plot", tmp_path / "serve.png")
    with fake_openai_server(behaviour="fails every third") as fake:
        result = run(*args, "--url", fake.url, "--concurrency", "2", "--json")
        assert result.exit_code == 0, result.stderr
        printed = json.loads(result.stdout)
        assert len(printed["runs"][fake.url]) == 2
        assert len(printed["errors"]) == 2
    with fake_openai_server() as fake:
        chat = ("bench", "serve", "chat", *CHAT, "--think-s", "0.01", "--repeat", "1", "--url", fake.url)
        assert "--history recorded" in " ".join(run(*chat).stderr.split())
        result = run(*chat, "--history", "recorded", "--request-rate", "500")
        assert result.exit_code == 0, result.stderr
        assert "time to first token" in result.stdout
    with fake_openai_server(behaviour="refuses") as fake:
        result = run(*args, "--force", "--url", fake.url)
        assert result.exit_code == 1
        assert "no request succeeded" in result.stderr


def test_goals_save_each_load_and_go_on_from_a_file(
    run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cascade_llm.bench import goals
    from cascade_llm.bench.workloads import SharedPrefixWorkload

    model = save_tiny(tmp_path_factory.mktemp("goals"))
    small = {
        name: goals.Goal(
            title=name,
            workload=SharedPrefixWorkload(prefix_len=length, num_requests=2, suffix_len=4, output_len=4),
            decode=1.5,
            cold=None,
        )
        for name, length in (("short", 8), ("long", 40))
    }
    monkeypatch.setattr(goals, "GOALS", small)
    output, markdown, plot = tmp_path / "goals.json", tmp_path / "goals.md", tmp_path / "goals.png"
    args = ("bench", "goals", "-m", model, *ENGINE, "--repeat", "1", "--output", output)
    first = run(*args, "--loads", "short", "--against", "transformers")
    assert first.exit_code == 0, first.stderr
    written = json.loads(output.read_text())
    assert list(written["results"]) == ["short"]
    assert written["results"]["short"]["ratio"]["transformers"].keys() >= {"cold"}
    assert "exists" in run(*args).stderr
    both = run(*args, "--resume", "--markdown", markdown, "--plot", plot)
    assert both.exit_code == 0, both.stderr
    assert list(json.loads(output.read_text())["results"]) == ["short", "long"]
    assert json.loads(output.read_text())["results"]["short"] == written["results"]["short"]
    assert list(json.loads(output.read_text())["reports"]) == ["short", "long"]
    lines = markdown.read_text().splitlines()
    assert any(line.startswith("| short |") for line in lines)
    assert any(line.startswith("| long |") for line in lines)
    assert plot.exists()
    output.write_text("{}")
    assert "does not hold results" in run(*args, "--resume").stderr
    assert "--resume needs --output" in run("bench", "goals", "--resume").stderr
    assert "did you mean 'short'" in run("bench", "goals", "-m", model, "--loads", "shor").stderr


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
        (("throughput", "random", "--peer-python", "python3"), "are for --against: name the engine"),
        (("goals", "--peer-python", "python3"), "are for --against: name the engine"),
        (("growth", "--output", "both.png", "--plot", "both.png"), "named twice: give each file a name of its own"),
        (("goals", "--output", "both.md", "--markdown", "both.md"), "named twice: give each file a name of its own"),
        (("calibrate", "--seconds", "nan"), "seconds"),
        (("attention", "--measure-s", "-1"), "-1.0 is not in the range x>=0"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(run: Run, args: tuple[str, ...], cure: str) -> None:
    result = run("bench", *args)
    assert result.exit_code in (1, 2)
    assert cure in " ".join(result.stderr.split())


def test_goals_go_on_with_the_same_settings_only_and_measure_interrupted_loads_again(
    run: Run,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cascade_llm.bench import goals
    from cascade_llm.bench.workloads import SharedPrefixWorkload

    workload = SharedPrefixWorkload(prefix_len=8, num_requests=2, suffix_len=4, output_len=4)
    monkeypatch.setattr(goals, "GOALS", {"short": goals.Goal(title="short", workload=workload, decode=None, cold=None)})
    output = tmp_path / "goals.json"
    args = ("bench", "goals", "-m", save_tiny(tmp_path_factory.mktemp("goals")), *ENGINE, "--output", output)
    assert run(*args, "--repeat", "1").exit_code == 0
    assert "another repeat" in run(*args, "--repeat", "2", "--resume").stderr
    written = json.loads(output.read_text())
    written["reports"]["short"]["interrupted"] = True
    output.write_text(json.dumps(written))
    assert run(*args, "--repeat", "1", "--resume").exit_code == 0
    again = json.loads(output.read_text())
    assert again["reports"]["short"]["interrupted"] is False
    assert again["results"]["short"] != written["results"]["short"]
