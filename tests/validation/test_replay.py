"""Recordings run again: attention on any backend, the engine where token ids are there; what is wrong is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import LLM, SamplingParams
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.errors import BackendError, CapacityError, ConfigError, PlanError
from cascade_llm.plan import StepResult, int_column
from cascade_llm.plan_file import PlanFileReader
from cascade_llm.validation.replay_file import replay
from cascade_llm.validation.report import Check, ValidationReport
from tests.engine.tiny_llm import random_forest, save_tiny, tiny_llm
from tests.plan_file.recordings import edit
from tests.validation.faults import FAULTS, install

TORCH = {"attention_backend": "torch"}
NUM_PROMPTS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def recorded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Record a run over a forest of prompts, each that is asked for once, and return the file."""
    known: dict[str, Path] = {}

    def run(params: SamplingParams, **options: Any) -> Path:
        name = repr((params, options))
        if name not in known:
            known[name] = tmp_path_factory.mktemp("recorded") / "plans.gz"
            with tiny_llm(folder, record_plans=known[name], **options) as llm:
                llm.generate(random_forest(0, NUM_PROMPTS, 97, 40), params)
                assert llm.stats()["cascade_steps"] > 0
        return known[name]

    return run


@pytest.fixture
def record(recorded: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """The file of such a run, for one test."""

    def run(params: SamplingParams | None = None, **options: Any) -> Path:
        params = params or SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        options = {"record_token_ids": True, "max_num_seqs": 8, "max_model_len": 64, **TORCH, **options}
        return Path(shutil.copy(recorded(params, **options), tmp_path))

    return run


def test_plans_with_windows_are_replayed(tmp_path: Path) -> None:
    """A shared prefix longer than the window: leaves hold what the windows cut of it."""
    folder, path = save_tiny(tmp_path / "tiny", "mistral", sliding_window=24), tmp_path / "plans.gz"
    prompts = [[*(3 + 7 * i % 80 for i in range(56)), *range(5, 6 + 3 * i)] for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    with tiny_llm(folder, record_plans=path, record_token_ids=True, max_num_seqs=8, max_model_len=96, **TORCH) as llm:
        llm.generate(prompts, params)
        assert llm.stats()["cascade_steps"] > 0
    with PlanFileReader(path) as reader:
        cascades = [step.plan.cascade for step in reader]
    assert any(c.shared_levels and c.path_len(next(c.paths())) < 56 for c in cascades)
    report = replay(path, folder, options=TORCH)
    assert report.passed


def test_a_recording_of_several_pools_is_replayed(tmp_path: Path) -> None:
    """Layers with a window have a pool of their own, and forks copy a page in each."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    folder, path = tmp_path / "tiny", tmp_path / "plans"
    save_tiny(folder, "gemma3_text", num_hidden_layers=3, layer_types=layers, sliding_window=12)
    prompts = [[*(3 + 7 * i % 80 for i in range(42)), *range(5, 6 + 3 * i)] for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, n=2)
    with tiny_llm(folder, record_plans=path, record_token_ids=True, max_num_seqs=8, max_model_len=96, **TORCH) as llm:
        llm.generate(prompts, params)
        assert llm.stats()["cascade_steps"] > 0
        pool_pages = [*llm.facts.pool_pages]
    with PlanFileReader(path) as reader:
        assert reader.header.pool_pages == pool_pages
        copied_in = {copy.pool for step in reader for copy in step.plan.page_copies}
    assert pool_pages[1] < pool_pages[0]
    assert copied_in == {0, 1}
    report = replay(path, folder, TORCH)
    assert report.passed
    found = checks_of(report)["torch: sampled tokens against the recorded ones"].figures
    assert (found["tokens"], found["greedy_differing"]) == (4 * 2 * 8, 0)
    edit(path, 1, lambda header: header.update(pool_pages=[pool_pages[0], 3]))
    with pytest.raises(PlanError, match="the pool has 3 pages"):
        replay(path, folder, TORCH)


def with_other_tokens(result: StepResult) -> StepResult:
    return replace(result, token_ids=[(token_id + 1) % 97 for token_id in result.token_ids])


def checks_of(report: ValidationReport) -> dict[str, Check]:
    return {check.name: check for section in report.sections for check in section.checks}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("token_ids", [False, True])
def test_attention_of_every_step_is_right(record: Callable[..., Path], dtype: str, token_ids: bool) -> None:
    report = replay(record(dtype=dtype, record_token_ids=token_ids), options=TORCH)
    assert report.passed
    checks = checks_of(report)
    assert list(checks) == [
        "torch: recorded plans against float64",
        "torch: their single-level plans against float64",
        "torch: recorded plans against single-level ones",
    ]
    assert all(check.figures["steps"] > 6 for check in checks.values())
    assert checks["torch: recorded plans against float64"].figures["out"] > 0
    assert report.subject["recorded"]["dtype"] == dtype


def test_every_backend_that_can_run_is_replayed(record: Callable[..., Path]) -> None:
    report = replay(record())
    assert report.passed
    verdicts = {name.split(":")[0]: check.verdict for name, check in checks_of(report).items()}
    assert verdicts["torch"] == "passed"
    if not torch.cuda.is_available():
        assert verdicts["flashinfer"] == "skipped"
        with pytest.raises(BackendError, match="needs a CUDA GPU"):
            replay(record(), options={"attention_backend": "flashinfer"})


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_backend_is_found_and_the_frame_named(
    record: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, fault: type[TorchAttentionBackend]
) -> None:
    path = record()
    install(monkeypatch, fault)
    report = replay(path, options=TORCH)
    assert not report.passed
    found = checks_of(report)["torch: recorded plans against float64"]
    assert found.passed is False
    assert found.note.startswith("first wrong at frame ")


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
        SamplingParams(temperature=0.9, top_p=0.9, max_tokens=6, n=3, ignore_eos=True, seed=3),
        SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=6, logit_bias={5: 2.0}, prompt_logprobs=2),
    ],
    ids=["greedy", "drawn", "penalized"],
)
def test_the_engine_samples_the_recorded_tokens(
    record: Callable[..., Path], folder: Path, lag: int, params: SamplingParams
) -> None:
    path = record(params, schedule_lag=lag)
    report = replay(path, folder, TORCH)
    assert report.passed
    found = checks_of(report)["torch: sampled tokens against the recorded ones"].figures
    assert found["tokens"] > NUM_PROMPTS * params.n
    assert found["greedy_differing"] == found["drawn_differing"] == found["finiteness_differing"] == 0


def test_preempted_sequences_are_replayed(record: Callable[..., Path], folder: Path) -> None:
    """A pool of 24 pages, each of 4 tokens with K and V of 3 layers, 2 heads and 8 numbers of 4 bytes."""
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    path = record(params, kv_cache_bytes=24 * 4 * 2 * 3 * 2 * 8 * 4)
    with PlanFileReader(path) as reader:
        resumed = [start for step in reader for start in step.plan.lane_starts if len(start.output_token_ids)]
    assert resumed
    assert replay(path, folder, TORCH).passed


def test_tokens_that_differ_are_counted_with_their_margin(record: Callable[..., Path], folder: Path) -> None:
    path = record()
    edit(path, 3, with_other_tokens)
    report = replay(path, folder, TORCH)
    assert not report.passed
    found = checks_of(report)["torch: sampled tokens against the recorded ones"]
    assert found.figures["greedy_differing"] >= 1
    assert found.figures["margins"][0]["margin"] > 0.01
    assert "at frame" in found.found


def test_drawn_tokens_that_differ_are_counted(record: Callable[..., Path], folder: Path) -> None:
    path = record(SamplingParams(temperature=1.0, max_tokens=4, ignore_eos=True))
    for frame in (3, 5, 7):
        edit(path, frame, with_other_tokens)
    report = replay(path, folder, TORCH)
    assert not report.passed
    found = checks_of(report)["torch: sampled tokens against the recorded ones"].figures
    assert found["drawn_differing"] >= NUM_PROMPTS
    assert found["greedy"] == 0


def test_logits_that_were_not_finite_must_be_again_not(record: Callable[..., Path], folder: Path) -> None:
    path = record()
    edit(path, 3, lambda result: replace(result, failed_samples=frozenset({0})))
    found = checks_of(replay(path, folder, TORCH))["torch: sampled tokens against the recorded ones"]
    assert found.passed is False
    assert found.figures["finiteness_differing"] == 1


def test_other_weights_give_other_tokens(record: Callable[..., Path], tmp_path: Path) -> None:
    path = record()
    other = tmp_path / "other"
    model = save_tiny(other)
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= -1
    save_file(weights, model / "model.safetensors")
    report = replay(path, model, TORCH)
    assert not report.passed
    note = checks_of(report)["torch: sampled tokens against the recorded ones"].note
    assert note.endswith("replayed with other of the same shape")


def test_another_model_is_refused(record: Callable[..., Path], tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(PlanError, match=r"num_layers 3 \(here 1\), not with other: give the model"):
        replay(record(), other, TORCH)


def test_without_token_ids_the_engine_is_refused(record: Callable[..., Path], folder: Path) -> None:
    with pytest.raises(PlanError, match=r"recorded without token ids.*record_token_ids=True, or leave the model out"):
        replay(record(record_token_ids=False), folder, TORCH)


def test_a_truncated_file_is_said_to_be_one(record: Callable[..., Path], folder: Path) -> None:
    path = record()
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(PlanError, match=r"frame \d+: .*allow a truncated file"):
        replay(path, options=TORCH)
    report = replay(path, folder, TORCH, allow_truncated=True)
    assert report.passed
    note = checks_of(report)["truncated file"].note
    assert "breaks off at frame" in note


def test_a_wrong_plan_never_reaches_a_kernel(record: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend sees the steps before the wrong frame, and none from there on."""
    path = record()
    prepared: list[int] = []

    class Counting(TorchAttentionBackend):
        def prepare(self, plan: Any) -> Any:
            prepared.append(plan.num_rows)
            return super().prepare(plan)

    edit(path, 6, lambda step: replace(step, slots=int_column([0, *step.slots[1:]])))
    install(monkeypatch, Counting)
    with pytest.raises(PlanError, match="frame 6: "):
        replay(path, options=TORCH)
    seen = len(prepared)
    replay(path, options=TORCH, max_steps=2)
    assert seen == len(prepared) - seen


def test_a_file_without_steps(folder: Path, tmp_path: Path) -> None:
    LLM(folder, record_plans=tmp_path / "plans.gz").close()
    with pytest.raises(PlanError, match="has no steps: record a run"):
        replay(tmp_path / "plans.gz")


def test_a_pool_too_large_for_this_machine(record: Callable[..., Path]) -> None:
    path = record()
    edit(path, 1, lambda header: header.update(pool_pages=[2**40]))
    with pytest.raises(CapacityError, match=r"one layer of the recorded pool takes .* are free"):
        replay(path, options=TORCH)


def test_options_of_the_recording_are_not_the_users(record: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="page_size is replayed as it was recorded"):
        replay(record(), options={"page_size": 8})
