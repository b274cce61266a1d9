"""Validation and replays of engines with pages of 8 bits: pools of the page's dtype, decoded for the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm import SamplingParams
from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.ops import shape_reasons
from cascade_llm.attention.select import BackendChoice, select_backend
from cascade_llm.errors import BackendError
from cascade_llm.kv_cache.paged_kv_cache import KVScale, PagedKVCache
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.plan_file import PlanFileReader
from cascade_llm.validation import attention_check, engine_replay, replay, replay_file
from cascade_llm.validation.attention_check import FAMILIES, check_attention
from cascade_llm.validation.engine_check import BATCH, EngineLoad
from cascade_llm.validation.report import Check
from cascade_llm.validation.validate import Effort, _engine_options, validate
from cascade_llm.worker.worker import build_worker
from tests.engine.tiny_llm import random_forest, save_tiny
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm

FP8 = torch.float8_e4m3fn
PAGES = {"kv_cache_dtype": "fp8_e4m3"}
LOAD = EngineLoad(prefix_len=24, num_places=6, num_settling=2, num_observed=2)


class OnDouble(FlashInferAttentionBackend):
    """FlashInfer's backend where there is no GPU."""

    def __init__(self, spec: AttentionSpec, kv_cache: PagedKVCache) -> None:
        super().__init__(spec, kv_cache, double_gpu(exact=False).platform())


def select(name: str, spec: AttentionSpec) -> BackendChoice:
    """As the package's, but for what it says of the device."""
    if name != "flashinfer":
        return select_backend(name, spec)
    if shape_reasons(spec):
        raise BackendError("; ".join(shape_reasons(spec)))
    return BackendChoice(name=name, backend=OnDouble, refused=())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "qwen3", **{**SHAPE, "head_dim": 128})


def checked(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    """Of pages of 8 bits alone."""
    monkeypatch.setattr(attention_check, "select_backend", select)
    monkeypatch.setattr(attention_check, "NUMBERS", ())
    config = model_config_from_hf(open_checkpoint(tiny).hf_config())
    device = torch.device("cpu")
    checks = check_attention(config, device, cases_per_family=4, seed=1, progress=lambda *_: None, kv_dtype=FP8)
    return {check.name: check for check in checks}


def test_attention_over_decoded_pages_is_checked(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = checked(tiny, monkeypatch)
    own = [check for name, check in checks.items() if name.startswith("flashinfer, bfloat16, float8_e4m3fn pages")]
    assert [check.passed for check in own] == [True] * len(FAMILIES)
    assert all(check.figures["plans"] >= 4 for check in own)
    torchs = [check for name, check in checks.items() if name.startswith("torch, bfloat16, float8_e4m3fn pages")]
    assert [check.passed for check in torchs] == [True] * len(FAMILIES)


def test_a_scale_that_is_left_out_fails_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FlashInferAttentionBackend.prepare

    def unscaled(self: FlashInferAttentionBackend, plan: Any) -> Any:
        self.kv_cache.scales = [KVScale()] * self.kv_cache.num_layers
        return original(self, plan)

    monkeypatch.setattr(OnDouble, "prepare", unscaled)
    checks = checked(tiny, monkeypatch)
    own = [check for name, check in checks.items() if name.startswith("flashinfer, bfloat16, float8_e4m3fn pages")]
    assert [check.passed for check in own] == [False] * len(FAMILIES)


@pytest.mark.parametrize(("options", "num_bytes"), [({}, 2), (PAGES, 1)])
def test_the_pool_of_a_validation_is_as_large_as_its_pages(tiny: Path, options: dict[str, str], num_bytes: int) -> None:
    config = model_config_from_hf(open_checkpoint(tiny).hf_config())
    effort = Effort(cases_per_family=1, load=LOAD, prompt_lens=(4,), num_new=4)
    found = _engine_options({"dtype": "bfloat16", "page_size": 4, **options}, config, effort)
    assert found.kv_cache_bytes == (BATCH + 1) * 8 * 4 * (2 * 2 * 2 * 128) * num_bytes


@pytest.fixture(scope="module")
def recording(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "plans.gz"
    options = {"record_plans": path, "record_token_ids": True, "max_model_len": 64, "max_num_seqs": 8, **PAGES}
    with gpu_llm(tiny, double_gpu(), **options) as llm:
        llm.generate(random_forest(0, 8, 90, 40), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
        assert llm.stats()["cascade_steps"] > 0
    return path


def test_a_replay_of_the_engine_has_the_recorded_pages(
    tiny: Path, recording: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with PlanFileReader(recording) as reader:
        header = reader.header
    assert header.kv_cache_dtype == "fp8_e4m3"
    found = []

    def build(*arguments: Any, **options: Any) -> Any:
        found.append(build_worker(*arguments, **options, platform=double_gpu().platform()))
        return found[-1]

    monkeypatch.setattr(engine_replay, "build_worker", build)
    (check,) = engine_replay.replay_engine(recording, tiny, {"enforce_eager": True})
    runner, facts = found[0]
    assert check.passed
    assert check.figures["greedy_differing"] == 0
    assert runner.kv_cache.dtype == FP8
    assert [*facts.pool_pages] == header.pool_pages


def test_a_replay_of_attention_has_the_recorded_pages(recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = replay_file.replay(recording)
    assert report.passed, "torch reads such pages too"
    monkeypatch.setattr(replay, "select_backend", select_exactly)
    report = replay_file.replay(recording, options={"attention_backend": "flashinfer"})
    assert report.passed


def select_exactly(name: str, spec: AttentionSpec) -> BackendChoice:
    """float32 was recorded, which only the exact double computes in."""
    assert spec.page_dtype == FP8
    assert name == "flashinfer"
    return BackendChoice(name=name, backend=ExactOnDouble, refused=())


class ExactOnDouble(FlashInferAttentionBackend):
    """In float32."""

    def __init__(self, spec: AttentionSpec, kv_cache: PagedKVCache) -> None:
        super().__init__(spec, kv_cache, double_gpu().platform())


def test_what_cannot_be_served_is_known_before_anything_is_compared(tiny: Path) -> None:
    told: list[str] = []
    effort = Effort(cases_per_family=1, load=LOAD, prompt_lens=(4,), num_new=4)
    with pytest.raises(BackendError, match="flashinfer"):
        validate(
            tiny,
            {**PAGES, "attention_backend": "flashinfer"},
            effort=effort,
            progress=lambda what, done, total: told.append(what),
        )
    assert len(told) == 1
