"""The suite for the day of measuring, run from end to end on the doubles at a tiny size."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import LLM
from cascade_llm.attention.flashinfer.backend import GpuPlatform
from scripts.gpu_suite import __main__ as gpu_suite_module
from scripts.gpu_suite import attention_stage, imports, suite
from scripts.gpu_suite.__main__ import main as gpu_suite_main
from scripts.gpu_suite.engine_stage import VARIANTS
from scripts.gpu_suite.machine import Machine
from scripts.gpu_suite.rates import decode_floor_s
from scripts.gpu_suite.shapes import FULL, MODELS, TREES, ModelShape, Sizes, Tree
from scripts.gpu_suite.suite import STAGES, Suite
from scripts.gpu_suite.watchdog import STOPPED
from tests.gpu_path.gpu_engine import double_gpu, on_double

TINY = Sizes(
    trees=(Tree.parse("1,2,4/16,32,8"), Tree.parse("4/24")),
    heads=((4, 2),),
    head_dim=64,
    models=(ModelShape("tiny", 1, 2, 1, 64, 64, 64, 128),),
    batches=(1, 3),
    prefixes=(0, 32),
    own_len=8,
    decode_steps=4,
    copy_bytes=1 << 16,
    matrix_size=32,
    load_requests=4,
    load_range=(4, 10),
)


class DoubleMachine(Machine):
    """The doubles, in bfloat16 as on a GPU."""

    device, dtype = torch.device("cpu"), torch.bfloat16

    def platform(self) -> GpuPlatform:
        return double_gpu(exact=False).platform()

    def seconds(self, work: Callable[[], object], *, captured: bool = True) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def llm(self, config: Path, **options: Any) -> LLM:
        with on_double(double_gpu(exact=False)):
            return LLM(config, load_format="dummy", device="cpu", dtype="bfloat16", **options)

    def synchronize(self) -> None:
        return


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    Suite(DoubleMachine(), folder, TINY, budget_s=600).run()
    return folder


def test_every_stage_ends_with_a_result(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    assert [name for name in results if name.endswith("_failed")] == []
    assert set(STAGES) <= set(results)
    assert set(results["seconds"]) == set(STAGES)


def test_kernels_are_validated(out: Path) -> None:
    entries = json.loads((out / "results.json").read_text())["validation"]
    for mode in ("eager", "graph"):
        kernels = {entry["kernels"] for entry in entries if entry["mode"] == mode}
        assert kernels == {"decode_tensor_cores", "decode_cuda_cores"}
    for entry in entries:
        assert "refused" not in entry
        assert entry["max_error"] < 0.05
        assert entry["max_lse_error"] < 0.05


def test_refusals_are_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any) -> None:
        raise RuntimeError("not on this device")

    monkeypatch.setattr(attention_stage.Setting, "eager", refused)
    entries = attention_stage.validate_kernels(DoubleMachine(), TINY, lambda: True)
    eager, graphs = ([entry for entry in entries if entry["mode"] == mode] for mode in ("eager", "graph"))
    assert {entry["refused"] for entry in eager} == {"RuntimeError: not on this device"}
    assert graphs
    assert all(entry["max_error"] < 0.05 for entry in graphs), "one refusal leaves the others"


def test_attention_is_measured_every_way(out: Path) -> None:
    shared, alone = json.loads((out / "results.json").read_text())["attention"]
    assert {"floor_us", "plain_us", "ours_us", "ours_one_level_us", "ours, eager_us"} <= shared.keys()
    assert "ours, decode_cuda_cores_us" in shared
    assert [name for name in shared if name.endswith("_error")] == ["flashinfer_cascade_error"]
    assert "plain_us" in alone
    assert "ours_us" not in alone


def test_engine_steps_have_floors_and_run_in_graphs(out: Path) -> None:
    results = json.loads((out / "results.json").read_text())
    steps = [entry for entry in results["engine_steps"] if "batch" in entry]
    assert [entry for entry in steps if "error" in entry] == []
    assert {(entry["batch"], entry["prefix"]) for entry in steps} == {(1, 0), (3, 0), (1, 32), (3, 32)}
    assert {entry["variant"] for entry in steps} == set(VARIANTS)
    assert all(entry["step_ms"] > 0 and entry["floor_ms"] > 0 for entry in steps)
    assert results["load"]["graph_steps"] > 0
    assert results["load"]["out_tokens"] > 0


def test_plots_come_in_one_archive(out: Path) -> None:
    pytest.importorskip("matplotlib")
    with tarfile.open(out / "plots.tar") as archive:
        names = archive.getnames()
    assert "steps_tiny.png" in names
    assert "attention_4_2.png" in names


def test_out_of_time_is_said_and_not_silent(tmp_path: Path) -> None:
    results = Suite(DoubleMachine(), tmp_path, TINY, budget_s=0).run()
    for stage in ("validation", "attention", "plans", "engine_steps"):
        assert all("skipped" in entry for entry in results[stage])
    assert "skipped" in results["load"]


@pytest.mark.parametrize("tree", TREES, ids=str)
def test_every_tree_of_the_list_becomes_valid_plans(tree: Tree) -> None:
    for num_shared in (0, 1, None):
        plan = tree.plan(num_shared)
        plan.check()
        assert plan.num_rows == tree.rows
    assert len(plan.levels) == len(tree.nodes)
    assert max(page for level in plan.levels for page in level.kv_page_indices) < tree.num_pages


@pytest.mark.parametrize(
    ("model", "prefix", "batch", "floor_ms"),
    [(1, 1024, 64, 4.1), (1, 8192, 256, 8.7), (1, 32768, 128, 7.8), (0, 1024, 256, 2.21), (0, 32768, 64, 1.59)],
)
def test_floor_is_that_of_the_roofline_table(model: int, prefix: int, batch: int, floor_ms: float) -> None:
    """4.3 TB/s and 790 TFLOP/s, 256 own tokens."""
    floor = 1e3 * decode_floor_s(MODELS[model], batch, prefix, 256, 4.3e12, 790e12)
    assert floor == pytest.approx(floor_ms, rel=0.04)


def test_full_sizes_are_the_whole_list() -> None:
    assert len(FULL.trees) == 16
    assert {len(tree.nodes) == len(tree.tokens) for tree in FULL.trees} == {True}


def test_fp8_pages_are_validated_over_what_they_decode_to(tmp_path: Path) -> None:
    sizes = replace(TINY, head_dim=128, trees=TINY.trees[:1])
    entries = Suite(DoubleMachine(), tmp_path, sizes, 600, fp8=True).run(["validation"])["validation"]
    by_pages = {name: [e for e in entries if e["pages"] == name] for name in ("bfloat16", "float8_e4m3fn")}
    assert [e["kernels"] for e in by_pages["bfloat16"]] == [e["kernels"] for e in by_pages["float8_e4m3fn"]]
    assert {e["kernels"] for e in entries} == {"decode_tensor_cores", "decode_cuda_cores"}
    assert all(entry["max_error"] < 0.05 and entry["max_lse_error"] < 0.05 for entry in entries)


def test_a_stage_that_raises_is_a_result_and_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {}

    def fails(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def looks(*arguments: Any) -> str:
        written.update(json.loads((tmp_path / "results.json").read_text()))
        return "planned"

    monkeypatch.setattr(suite, "validate_kernels", fails)
    monkeypatch.setattr(suite, "measure_plans", looks)
    results = Suite(DoubleMachine(), tmp_path, TINY, budget_s=600).run(["rates", "validation", "plans"])
    assert "an illegal memory access" in results["validation_failed"]
    assert results["plans"] == "planned"
    assert {"rates", "validation_failed"} <= written.keys(), "the file is there before the next stage begins"


HANGS = """
import sys, time
from pathlib import Path
from scripts.gpu_suite import suite
from scripts.gpu_suite.watchdog import start_watchdog
from tests.gpu_path.test_gpu_suite import TINY, DoubleMachine
suite.measure_plans = lambda *arguments: time.sleep(600)
run = suite.Suite(DoubleMachine(), Path(sys.argv[1]), TINY, 600)
start_watchdog(1.0, run.stop)
run.run(["rates", "plans"])
"""


def test_a_stage_that_hangs_is_ended_and_the_results_are_kept(tmp_path: Path, repo_root: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], cwd=repo_root, timeout=300, check=False)
    assert done.returncode == STOPPED
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["stopped"] == "out of time in stage plans"
    assert results["rates"]["copy_bytes_per_s"] > 0


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command line on a machine that has only torch."""
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr(imports, "IMPORTS", ("torch", "no_such_package"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_suite", "--out", str(tmp_path / "out"), *arguments])
        return gpu_suite_main()

    return run


def test_without_a_gpu_it_says_so_after_listing_what_cannot_be_imported(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start() == 1
    printed = capsys.readouterr()
    assert "cannot import no_such_package" in printed.out
    assert "no CUDA device" in printed.err
    assert start("--dry-run") == 0
    assert "no_such_package" in json.loads((tmp_path / "out" / "results.json").read_text())["imports"]


def test_what_it_cannot_do_without_ends_it(
    start: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_suite_module, "REQUIRED", ("no_such_package",))
    assert start("--dry-run") == 1
    assert "nothing can be measured" in capsys.readouterr().err


def test_imports_are_checked_before_anything_else_is_imported(run_python: Callable[[str], str]) -> None:
    code = "import sys\nimport scripts.gpu_suite.__main__\nprint({'torch', 'cascade_llm'} & set(sys.modules))"
    assert run_python(code).strip() == "set()"


def test_too_much_to_carry_is_said_before_it_is_carried(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels = tmp_path / "kernels" / "page"
    kernels.mkdir(parents=True)
    (kernels / "page.so").write_bytes(b"x" * (1 << 20))
    assert start("--dry-run", "--kernels", str(kernels.parent)) == 0
    assert "carried: 1.0 of 64 MiB" in capsys.readouterr().out
    with (kernels / "page.so").open("wb") as file:
        file.truncate(65 << 20)
    assert start("--dry-run", "--kernels", str(kernels.parent)) == 1
    assert "too much to carry" in capsys.readouterr().err
