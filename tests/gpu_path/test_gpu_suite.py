"""The suite for the day of measuring: its stages run on the doubles, its runner with real processes that end badly."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import SamplingParams
from cascade_llm.attention.flashinfer.graph import GraphAttention
from cascade_llm.attention.flashinfer.ops import FlashInferOps
from cascade_llm.bench.attention_cases import AttentionCase
from cascade_llm.device.ranks import Ranks
from cascade_llm.errors import GenerationError
from cascade_llm.outputs import CompletionOutput, TokenLogprob
from cascade_llm.scheduler.cascade.device_costs import DeviceCosts
from cascade_llm.weights.codes import Codes
from cascade_llm.weights.cuda_fp8 import CudaFP8
from cascade_llm.weights.cuda_int4 import CudaInt4
from cascade_llm.weights.stack import Grouped
from scripts.gpu_suite import __main__ as command_line
from scripts.gpu_suite import runner
from scripts.gpu_suite.equality import Equality
from scripts.gpu_suite.machine import CARDS, known_card
from scripts.gpu_suite.runner import MAX_FILES, Runner, Stage, pack, save_json
from scripts.gpu_suite.sizes import DRY, FULL, MODELS, QUICK, Sizes, decode_floor_s
from scripts.gpu_suite.stage import StageRun
from scripts.gpu_suite.stages import (
    attention,
    engine,
    experiments,
    experts,
    profile,
    ranks,
    replay,
    smoke,
    timing,
    weights,
)
from scripts.gpu_suite.stages import machine as machine_stage
from scripts.gpu_suite.table import STAGES
from tests.gpu_path.double_machine import DoubleMachine
from tests.rank_threads import in_ranks

ONE_MODEL = replace(DRY, small_models=DRY.small_models[:1])


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., StageRun]:
    """A stage's surroundings, on the double."""

    def make(name: str, sizes: Sizes = DRY, seconds: float = 600) -> StageRun:
        for folder in ("out", "scratch"):
            (tmp_path / folder).mkdir(exist_ok=True)
        file = tmp_path / "out" / f"{name}.json"
        ends = time.perf_counter() + seconds
        return StageRun(
            name, DoubleMachine(), sizes, file.parent, tmp_path / "scratch", lambda found: save_json(file, found), ends
        )

    return make


# -- stages -----------------------------------------------------------------------------------------------------------


def test_the_machine_is_named(stage: Callable[..., StageRun]) -> None:
    found = machine_stage.run(stage("machine"))
    assert found["versions"]["torch"] == torch.__version__
    assert {"driver", "commit", "sources", "memory_bytes", "cannot_import"} <= found.keys()
    assert {"flashinfer-python", "triton"} <= found["versions"].keys()
    assert found["copy_bytes_per_s"] > 0


def test_every_call_of_flashinfer_is_compared_with_torch(stage: Callable[..., StageRun]) -> None:
    found = smoke.run(stage("smoke"))
    assert found["verdict"] == "passed"
    assert found["never_called"] == []
    called = {entry["call"].split(":")[0] for entry in found["calls"]}
    assert called == {field.name for field in fields(FlashInferOps)}


def test_a_call_that_is_off_or_refused_fails_the_smoke_test(
    stage: Callable[..., StageRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = DoubleMachine.platform

    def broken(self: DoubleMachine) -> Any:
        platform = made(self)
        ops = replace(
            platform.ops,
            silu_and_mul=lambda x: x[:, : x.shape[1] // 2],
            rmsnorm=lambda *arguments: pytest.fail("no kernel image"),
        )
        return replace(platform, ops=ops)

    monkeypatch.setattr(DoubleMachine, "platform", broken)
    monkeypatch.setattr(pytest, "fail", _refused)
    found = smoke.run(stage("smoke"))
    assert found["verdict"] == "failed"
    assert {name.split(":")[0] for name in found["headline"]["wrong"]} == {"silu_and_mul", "rmsnorm"}
    assert any("no kernel image" in entry.get("refused", "") for entry in found["calls"])


def _refused(reason: str) -> None:
    raise RuntimeError(reason)


def test_replays_are_compared_with_float64(stage: Callable[..., StageRun]) -> None:
    found = replay.run(stage("replay", ONE_MODEL))
    assert found["verdict"] == "passed"
    assert [entry["model"] for entry in found["models"]] == ["gqa-64, 1 layers", "gqa-64, 2 layers"]
    for entry in found["models"]:
        assert entry["missing"] == []
        assert entry["replans"] >= replay.LEAST_REPLANS
        assert len(entry["shapes"]) > 2
        assert 0 < entry["out_error"] < 0.02


@pytest.mark.parametrize(
    "fault",
    ["stale levels", *(pytest.param(name, marks=pytest.mark.slow) for name in ("stale leaves", "levels left out"))],
)
def test_replays_that_are_off_are_noticed(
    fault: str, stage: Callable[..., StageRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    attend, plan_leaf = GraphAttention.attend, GraphAttention.plan_leaf

    def leaf_alone(self: GraphAttention, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(self, "_shared", [])
            return attend(self, layer, q)

    def once(self: GraphAttention, columns: Any, pages: Any) -> None:
        if pages is None:
            plan_leaf(self, columns, pages)

    if fault == "stale levels":
        monkeypatch.setattr(GraphAttention, "holds", lambda self, position, level: self.capacities[position] > 2)
    elif fault == "stale leaves":
        monkeypatch.setattr(GraphAttention, "plan_leaf", once)
    else:
        monkeypatch.setattr(GraphAttention, "attend", leaf_alone)
    try:
        found = replay.run(stage("replay", ONE_MODEL))
    except GenerationError:  # what is not finite ends the request
        return
    assert found["verdict"] == "failed"


@pytest.mark.slow
def test_ways_of_running_agree_and_a_race_is_told(stage: Callable[..., StageRun]) -> None:
    sizes = replace(ONE_MODEL, families=1, longest_equal=10)
    found = engine.run(stage("engine", sizes))
    assert found["headline"]["wrong"] == []
    assert len(found["runs"]) == 2 * 2 * 2 * len(engine.KINDS)
    assert sum(entry["graph_steps"] > 0 for entry in found["runs"]) == len(found["runs"]) / 2
    assert sum(entry["piecewise_steps"] > 0 for entry in found["runs"]) == len(found["runs"]) / 2
    blocking = stage("blocking", sizes)
    name = next(name for name in found["tokens"] if "graphs, lag 1, cascade, greedy" in name)
    next(iter(found["tokens"][name].values()))[-1] += 1
    save_json(blocking.folder / "engine.json", {"result": found})
    again = engine.run(blocking)
    assert again["headline"]["races"] == 1
    assert again["headline"]["wrong"] == [name]
    (blocking.folder / "engine.json").unlink()
    alone = engine.run(blocking)
    assert alone["verdict"] == "passed"
    assert alone["headline"]["compared_for_races"] == 0, "engine left nothing to compare with"


def test_loads_that_show_too_little_are_no_proof() -> None:
    ran = {"graph_steps": 9, "piecewise_steps": 9, "cascade_steps": 9, "most_rows": 40}
    assert engine._missing(engine.Way(graphs=True, lag=1, cascade=True), ran, 33) == []
    assert engine._missing(engine.Way(graphs=True, lag=1, cascade=True), {**ran, "piecewise_steps": 0}, 41) == [
        "most_rows",
        "piecewise_steps",
    ]
    assert engine._missing(engine.Way(graphs=True, lag=1, cascade=False), ran, 33) == ["cascade_steps"]
    seen = replay._Seen(replays=30, replans=30, groups_changed=1, levels_emptied=1, empty_segments=1)
    assert seen.missing(33) == ["pages_crossed", "shapes_changed", "most_rows"]


def test_decode_steps_are_timed_by_part(stage: Callable[..., StageRun]) -> None:
    found = timing.run(stage("timing"))
    (entry,) = [entry for entry in found["loads"] if "batch" in entry]
    assert entry["steps"] == len(entry["steps_ms"]) >= DRY.decode_steps
    assert entry["step_p95_ms"] >= entry["step_ms"] > 0
    assert entry["host_ms"].keys() == {"schedule", "submit", "wait", "commit"}
    assert entry["graph_steps"] >= entry["steps"]
    assert 0 <= entry["gpu_idle_share"] <= 1
    assert entry["gpu_busy_ms"] > 0
    assert 0 < entry["share_of_roofline"] < 1


def test_a_profile_lists_kernels_and_leaves_a_trace(stage: Callable[..., StageRun]) -> None:
    run = stage("profile")
    (found,) = profile.run(run)["models"]
    assert 0 < len(found["kernels"]) <= profile.NUM_KERNELS
    assert found["kernels"][0]["us_per_step"] > 0
    assert (run.folder / found["trace"]).stat().st_size < profile.TRACE_LIMIT_BYTES


def test_attention_is_timed_and_constants_are_fitted(stage: Callable[..., StageRun]) -> None:
    found = attention.run(stage("attention"))
    shared = found["cases"][-1]
    assert shared["us"].keys() == {"", "0", "1", "0,1"}
    assert shared["layers"] > 1, "else a layer finds its K/V in the cache"
    assert all(entry["errors"] == {} and entry["floor_us"] > 0 for entry in found["cases"])
    (fit,) = found["costs"]
    DeviceCosts(**fit["costs"])
    assert fit["key"]["backend"] == "flashinfer"


def test_quantized_products_are_compared_and_timed(stage: Callable[..., StageRun]) -> None:
    found = weights.run(stage("weights"))
    assert found["verdict"] == "passed"
    assert [entry["format"] for entry in found["products"]] == ["cuda_int4", "cuda_int4", "cuda_fp8", "cuda_fp8"]
    for entry in found["products"]:
        assert [row["rows"] for row in entry["rows"]] == list(DRY.product_rows)
        assert all(row["us"] > 0 < row["dense_us"] for row in entry["rows"])
        assert all(row["error"] > 0 for row in entry["rows"]), "all of them round something"
    assert weights.run(stage("weights", seconds=-1))["verdict"] == "not run"


def test_quantized_products_that_are_off_or_refused_fail_the_stage(
    stage: Callable[..., StageRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def shifted(self: CudaInt4, rows: slice, codes: Codes) -> None:
        take(self, rows, replace(codes, scales=codes.group_scales().roll(1, 0)))

    take = CudaInt4._take
    monkeypatch.setattr(CudaInt4, "_take", shifted)
    monkeypatch.setattr(CudaFP8, "multiply", lambda *arguments, **options: _refused("no kernel image"))
    found = weights.run(stage("weights"))
    assert found["verdict"] == "failed"
    assert len(found["headline"]["wrong"]) == len(weights.KINDS)
    assert any("no kernel image" in entry.get("refused", "") for entry in found["products"])


def test_the_product_of_experts_is_compared_and_timed(
    stage: Callable[..., StageRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = experts.run(stage("experts"))
    assert found["verdict"] == "passed"
    assert [entry["rows"] for entry in found["products"]] == list(DRY.product_rows)
    assert all(entry["us"] > 0 < entry["floor_us"] for entry in found["products"])
    assert experts.run(stage("experts", seconds=-1))["verdict"] == "not run"
    monkeypatch.setattr(Grouped, "multiply", lambda *arguments: _refused("no kernel image"))
    assert experts.run(stage("experts"))["headline"]["wrong"] == list(DRY.product_rows)


def test_two_ranks_are_compared_with_one(
    stage: Callable[..., StageRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stage("ranks", replace(ONE_MODEL, families=1, longest=10))
    assert in_ranks(2, tmp_path, lambda own: ranks._wrong_exchanges(own, run.machine)) == [[], []]
    monkeypatch.setattr(ranks, "_exchanges", lambda stage: {"wrong": [], "us": {}})
    found = ranks.run(run)
    assert found["headline"]["wrong"] == []
    assert found["verdict"] == "passed"
    assert len(found["runs"]) == len(engine.KINDS)
    told = ranks._told({"wrong": ["rank 1: sum"], "us": {}}, found["runs"])
    assert told["verdict"] == "failed"
    assert told["headline"]["wrong"] == ["rank 1: sum"]


@pytest.mark.slow
def test_ranks_exchange_in_processes_of_their_own(stage: Callable[..., StageRun]) -> None:
    found = ranks._exchanges(stage("ranks"))
    assert found["wrong"] == []
    assert found["us"].keys() == {str(2 * size) for size in DRY.exchanged}


@pytest.mark.slow
def test_ranks_that_sum_nothing_are_noticed(stage: Callable[..., StageRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "_exchanges", lambda stage: {"wrong": [], "us": {}})
    monkeypatch.setattr(Ranks, "all_reduce", lambda self, x: x)
    off = ranks.run(stage("ranks", replace(ONE_MODEL, families=1, longest=10)))
    assert off["verdict"] == "failed"
    assert off["headline"]["wrong"]


def test_ranks_need_as_many_gpus(stage: Callable[..., StageRun], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DoubleMachine, "num_devices", 1)
    found = ranks.run(stage("ranks"))
    assert found == {"verdict": "not run", "headline": {"why": "2 ranks need as many GPUs, here are 1"}}


def test_experiments_run_and_one_that_raises_leaves_the_others(
    stage: Callable[..., StageRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(stage: StageRun) -> dict[str, Any]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(experiments, "EXPERIMENTS", {"broken": fails, **experiments.EXPERIMENTS})
    found = experiments.run(stage("experiments"))
    assert "no kernel image" in found["headline"].pop("broken")
    assert set(found["headline"].values()) == {"done"}
    assert found["load"]["graph_steps"] > 0


def test_stages_without_time_skip_what_they_cannot_do(stage: Callable[..., StageRun]) -> None:
    assert all("skipped" in entry for entry in timing.run(stage("timing", seconds=0))["loads"])
    assert all("skipped" in entry for entry in attention.run(stage("attention", seconds=0))["cases"])
    assert all("skipped" in entry for entry in profile.run(stage("profile", seconds=0))["models"])
    for name, module in (("engine", engine), ("replay", replay)):
        found = module.run(stage(name, seconds=0))
        assert found["verdict"] == "failed", "nothing was compared"
        assert found["headline"]["skipped"]


# -- what equal means -------------------------------------------------------------------------------------------------


def output(*token_ids: int, tops: tuple[tuple[int, float], ...] = ((1, -0.5), (2, -0.6), (3, -3.0))) -> Any:
    reported = [TokenLogprob(token_id, dict(tops)[token_id], 1, tops) for token_id in token_ids]
    return {"a": CompletionOutput(0, token_ids=list(token_ids), finish_reason="length", logprobs=reported)}


def compared(one: Any, other: Any, **params: Any) -> Equality:
    equality = Equality(tolerance=0.08)
    equality.add(one, other, SamplingParams(**{"temperature": 0, **params}))
    return equality


def test_equality_allows_near_ties_and_nothing_else() -> None:
    assert compared(output(1, 2), output(1, 2)).passed
    tied = compared(output(1, 1), output(1, 2))
    assert tied.passed
    assert tied.near_ties == 1
    assert not compared(output(1, 1), output(1, 3)).passed
    assert not compared(output(1, 1), output(1)).passed
    assert not compared(output(1), output(1, tops=((1, -0.7), (2, -0.8), (3, -3.0)))).passed
    assert not compared(output(1), {}).passed
    # what was generated already is penalized: 1 is worse than 2 by then, so that taking 1 is no near-tie
    assert not compared(output(1, 1), output(1, 2), presence_penalty=-1.0).passed


def test_equality_counts_draws_and_allows_few() -> None:
    few = compared(output(*[1] * 60), output(*[1] * 59, 2), temperature=1.0)
    assert few.passed
    assert few.draws_differing == 1
    many = Equality(0.08)
    for _ in range(9):
        many.add(output(1, 1, 1), output(1, 1, 2), SamplingParams(temperature=1.0))
    assert not many.passed


# -- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "prefix", "batch", "floor_ms"),
    [(1, 1024, 64, 4.1), (1, 8192, 256, 8.7), (1, 32768, 128, 7.8), (0, 1024, 256, 2.21), (0, 32768, 64, 1.59)],
)
def test_floor_is_that_of_the_roofline_table(model: int, prefix: int, batch: int, floor_ms: float) -> None:
    """4.3 TB/s and 790 TFLOP/s, 256 own tokens."""
    floor = 1e3 * decode_floor_s(MODELS[model], batch, prefix, 256, 4.3e12, 790e12)
    assert floor == pytest.approx(floor_ms, rel=0.04)


def test_cards_are_known_by_name_and_others_are_measured() -> None:
    assert known_card("NVIDIA H200") == CARDS[0]
    assert known_card("NVIDIA H100 80GB HBM3") == CARDS[1]
    assert known_card("NVIDIA L40S") is None


@pytest.mark.parametrize("sizes", [FULL, QUICK])
def test_sizes_for_a_gpu_are_what_they_have_to_be(sizes: Sizes) -> None:
    heads = {(model.num_qo_heads == model.num_kv_heads, model.head_dim) for model in sizes.small_models}
    assert {is_mha for is_mha, _ in heads} == {True, False}
    assert {head_dim for _, head_dim in heads} == {64, 128}
    assert sizes.families * sizes.per_family > 32
    assert sizes.decode_steps >= 128
    for name in sizes.cases:
        AttentionCase.parse(name).plan(()).check()


# -- the runner -------------------------------------------------------------------------------------------------------


def ending(*names: str, limit_s: float = 60.0, **options: Any) -> list[Stage]:
    module = "tests.gpu_path.suite_processes"
    return [Stage(name=name, module=module, limit_s=limit_s, about="a test", **options) for name in names]


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_stage_that_crashes_costs_itself_alone(tmp_path: Path) -> None:
    summary = Runner(tmp_path, 300).run(ending("crashes", "silent", "raises", "says_no", "works"))
    assert {name: entry["ended"] for name, entry in summary["stages"].items()} == {
        "crashes": "killed by SIGSEGV",
        "silent": "wrote nothing",
        "raises": "exit status 1",
        "says_no": "finished",
        "works": "finished",
    }
    verdicts = [entry["verdict"] for entry in summary["stages"].values()]
    assert verdicts == ["failed", "failed", "failed", "failed", "passed"]
    assert "an illegal memory access" in summary["stages"]["crashes"]["output_tail"]
    assert "no kernel image" in summary["stages"]["raises"]["output_tail"]
    assert read(tmp_path / "summary.json") == summary
    assert read(tmp_path / "crashes.json")["result"]["so_far"] == 1, "what it had is kept"


@pytest.mark.slow
def test_a_stage_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "GRACE_S", 0.2)
    started = time.perf_counter()
    stages = [*ending("hangs", limit_s=4), *ending("works", environment={"OF_THE_STAGE": "yes"})]
    summary = Runner(tmp_path, 300).run(stages)
    assert time.perf_counter() - started < 60
    assert summary["stages"]["hangs"]["ended"] == "ran past its 4 s"
    assert "waiting for the device" in summary["stages"]["hangs"]["output_tail"]
    assert summary["stages"]["works"]["headline"] == {"environment": "yes"}


def test_stages_are_cut_when_the_budget_is_spent(tmp_path: Path) -> None:
    summary = Runner(tmp_path, 1.0).run(ending("works"))
    assert summary["stages"]["works"] == {"verdict": "not run", "ended": "no time left", "seconds": 0.0}


def test_a_wrapper_that_is_missing_is_told(tmp_path: Path) -> None:
    summary = Runner(tmp_path, 300).run(ending("works", wrapper=("no-such-program",)))
    assert summary["stages"]["works"]["ended"] == "no-such-program is not on the PATH"


def test_more_files_than_come_back_are_packed(tmp_path: Path) -> None:
    for number in range(MAX_FILES):
        (tmp_path / f"{number}.json").write_text("{}")
    pack(tmp_path)
    assert len(list(tmp_path.iterdir())) == MAX_FILES
    (tmp_path / "summary.json").write_text("{}")
    pack(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "stages.tar.gz"}
    with tarfile.open(tmp_path / "stages.tar.gz") as archive:
        assert len(archive.getnames()) == MAX_FILES


def test_the_parent_imports_no_torch(run_python: Callable[[str], str]) -> None:
    code = "import sys\nimport scripts.gpu_suite.__main__\nprint({'torch', 'cascade_llm'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_too_much_to_carry_is_said_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernels").mkdir()
    with (tmp_path / "kernels" / "page.so").open("wb") as file:
        file.truncate(65 << 20)
    monkeypatch.setattr(sys, "argv", ["gpu_suite", str(tmp_path / "out"), "--kernels", str(tmp_path / "kernels")])
    assert command_line.main() == 1
    assert "65.0 MiB are carried, 64 may be" in capsys.readouterr().out


def test_stages_that_are_named_run_after_the_machine_is_known() -> None:
    assert [stage.name for stage in command_line._chosen(["timing", "smoke"])] == ["machine", "smoke", "timing"]
    assert "experiments" not in [stage.name for stage in command_line._chosen([])]
    assert [stage.name for stage in command_line._chosen(["experiments"])] == ["machine", "experiments"]


def dry(out: Path, repo_root: Path, *options: str) -> Any:
    """The budget is against hanging alone: other work may take the processors."""
    command = [sys.executable, "-m", "scripts.gpu_suite", str(out), "--dry", "--budget-s", "3600", *options]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return read(out / "summary.json")


def test_the_command_runs_a_stage_in_a_process_of_its_own(tmp_path: Path, repo_root: Path) -> None:
    summary = dry(tmp_path, repo_root, "--stage", "machine")
    assert summary["stages"]["machine"]["verdict"] == "measured"
    assert summary["machine"]["name"] == "double"
    assert read(tmp_path / "machine.json")["result"]["versions"]["torch"] == torch.__version__


@pytest.mark.slow
def test_the_command_runs_every_stage(tmp_path: Path, repo_root: Path) -> None:
    summary = dry(tmp_path, repo_root)
    assert read(tmp_path / "smoke.json")["machine"]["versions"]["torch"] == torch.__version__
    assert set(summary["stages"]) == {stage.name for stage in STAGES if not stage.optional}
    assert {entry["ended"] for entry in summary["stages"].values()} <= {
        "finished",
        "compute-sanitizer is not on the PATH",
    }
    assert len(list(tmp_path.iterdir())) <= MAX_FILES
