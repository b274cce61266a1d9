"""`python -m benchmarks`: goals and growth of a tiny model, other engines in turns with ours, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.engine.tiny_llm import save_tiny
from tests.native_code import cache_without_measurements

SMALL = ("--prefix-len", "40", "--num-requests", "4", "--suffix-len", "4", "--output-len", "6", "--repeat", "1")
CHAT = ("--conversations", "2", "--turns", "2", "--system-len", "8", "--user-len", "4", "--output-len", "4")
ENGINE = ("--page-size", "4", "--cascade-shared-prefix-len", "8", "--dtype", "float32")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_LLM_CACHE", cache_without_measurements(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.slow
def test_latency_compares_with_another_engine_in_conversations(run: Run, tiny: Path) -> None:
    args = ("latency", "chat", "-m", tiny, *CHAT, *ENGINE, "--think-s", "0.01", "--request-rate", "500")
    result = run(*args, "--no-off", "--repeat", "1", "--against", "transformers", "--history", "recorded")
    assert result.exit_code == 0, result.stderr
    text = " ".join(result.stdout.split())
    assert "times as long as cascade on" in text
    assert "all that has arrived" in text, "the other engine's flags"


@pytest.mark.slow
def test_another_checkout_takes_turns_with_ours(run: Run, tiny: Path, repo_root: Path) -> None:
    args = ("throughput", "shared-prefix", "-m", tiny, *SMALL, *ENGINE, "--no-off", "--no-parts", "--json")
    result = run(*args, "--against", repo_root)
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["sides"]["checkout"]["package"] == str(repo_root / "cascade_llm")
    assert printed["ratio"]["checkout"]["decode"]["median"] > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("throughput", "shared-prefix", "--against", "vlm", "--prefix-len", "8"), "did you mean 'vllm'?"),
        (("throughput", "shared-prefix", "--against", "vllm", "--prefix-len", "8"), "--install-peer"),
        (("latency", "shared-prefix", "--against", "vllm", "--prefix-len", "8"), "--install-peer"),
        (
            ("throughput", "random", "--peer-python", "python3", "--max-len", "9", "--min-len", "8"),
            "are for --against: name the engine",
        ),
        (("goals", "--peer-python", "python3", "--loads", "none"), "are for --against: name the engine"),
        (("goals", "--output", "both.md", "--markdown", "both.md"), "named twice: give each file a name of its own"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(run: Run, tiny: Path, args: tuple[str, ...], words: str) -> None:
    result = run(*args, "-m", "smollm2" if args[0] == "goals" else tiny)
    assert result.exit_code in (1, 2)
    assert words in " ".join(result.stderr.split())
    assert result.stdout == ""


def test_growth_measures_every_point_once(run: Run, tiny: Path, tmp_path: Path) -> None:
    points = ("--batches", "1,3", "--at-prefix", "16", "--prefix-lens", "0,16", "--at-batch", "3")
    small = ("--suffix-len", "4", "--output-len", "4", "--repeat", "1", "--plot", tmp_path / "growth.png")
    result = run("growth", "-m", tiny, *points, *small, *ENGINE, "--json")
    assert result.exit_code == 0, result.stderr
    measured = json.loads(result.stdout)["points"]
    assert list(measured) == ["1 x 16", "3 x 16", "3 x 0"]
    for point in measured.values():
        assert point["planning_s"].keys() == point["share_of_limit"].keys() == {"cascade on", "cascade off"}
        assert 0 < point["planning_s"]["cascade on"] < point["step_s"]["cascade on"]
    assert [point["has_equal_plans"] for point in measured.values()] == [True, False, True]
    assert "3 sequences, 16 shared tokens:" in result.stderr, "each point is told as it comes"
    assert (tmp_path / "growth.png").exists()
    assert "write integers" in run("growth", "-m", tiny, "--batches", "1,two").stderr


@pytest.mark.slow
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
    args = ("growth", "-m", tiny, "--prefix-lens", "0,16", "--at-batch", "2", "--at-prefix", "8", *ENGINE)
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
    assert "--resume needs --output" in run("growth", "--resume").stderr


@pytest.mark.slow
def test_growth_shows_and_keeps_what_an_interruption_left(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import growth

    finish = growth.growth_result

    def interrupted(point: growth.GrowthPoint, report: Any) -> growth.GrowthResult:
        if point.batch == 2:
            raise KeyboardInterrupt
        return finish(point, report)

    monkeypatch.setattr(growth, "growth_result", interrupted)
    output, plot = tmp_path / "growth.json", tmp_path / "growth.png"
    args = ("--batches", "1,2", "--prefix-lens", "8", "--at-batch", "1", "--at-prefix", "8", "--output-len", "6")
    result = run("growth", "-m", tiny, *args, *ENGINE, "--repeat", "1", "--output", output, "--plot", plot)
    assert result.exit_code != 0
    assert "1 of 2 points: --resume measures the others" in " ".join(result.stderr.split())
    assert list(json.loads(output.read_text())["points"]) == ["1 x 8"]
    assert plot.exists()
    assert "equal plans" in " ".join(result.stdout.replace("│", " ").split())


@pytest.mark.slow
def test_goals_save_each_load_and_go_on_from_a_file(
    run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import goals
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
    args = ("goals", "-m", model, *ENGINE, "--repeat", "1", "--output", output)
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
    assert "--resume needs --output" in run("goals", "--resume").stderr
    assert "did you mean 'short'" in run("goals", "-m", model, "--loads", "shor").stderr


def test_goals_go_on_with_the_same_settings_only_and_measure_interrupted_loads_again(
    run: Run,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks import goals
    from cascade_llm.bench.workloads import SharedPrefixWorkload

    workload = SharedPrefixWorkload(prefix_len=8, num_requests=2, suffix_len=4, output_len=4)
    monkeypatch.setattr(goals, "GOALS", {"short": goals.Goal(title="short", workload=workload, decode=None, cold=None)})
    output = tmp_path / "goals.json"
    args = ("goals", "-m", save_tiny(tmp_path_factory.mktemp("goals")), *ENGINE, "--output", output)
    assert run(*args, "--repeat", "1").exit_code == 0
    assert "another repeat" in run(*args, "--repeat", "2", "--resume").stderr
    written = json.loads(output.read_text())
    written["reports"]["short"]["interrupted"] = True
    output.write_text(json.dumps(written))
    assert run(*args, "--repeat", "1", "--resume").exit_code == 0
    again = json.loads(output.read_text())
    assert again["reports"]["short"]["interrupted"] is False
    assert again["results"]["short"] != written["results"]["short"]
