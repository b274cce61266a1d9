"""All sections of a validation together, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.errors import ConfigError, ModelNotFoundError
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.validation.engine_check import EngineLoad
from cascade_llm.validation.report import Check, Section, ValidationReport
from cascade_llm.validation.validate import QUICK, Effort, _engine_options, validate
from tests.engine.tiny_llm import save_tiny
from tests.validation.faults import ForgetsALevel, install

EFFORT = Effort(
    cases_per_family=2,
    load=EngineLoad(prefix_len=24, num_places=6, num_settling=2, num_observed=2),
    prompt_lens=(1, 20),
    num_new=4,
)
OPTIONS = {"dtype": "float32", "page_size": 4, "attention_backend": "torch"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


def test_all_sections_are_there_and_pass(folder: Path) -> None:
    report = validate(folder, OPTIONS, effort=EFFORT, seed=3)
    assert report.passed
    titles = ["attention backends against float64", "engine against itself", "model against transformers"]
    assert [section.title for section in report.sections] == titles
    value = json.loads(json.dumps(report.as_dict()))
    assert value["passed"] is True
    assert value["subject"]["dtype"] == "float32"
    assert value["subject"]["seed"] == 3
    assert all(
        check["verdict"] in ("passed", "skipped") for section in value["sections"] for check in section["checks"]
    )
    assert all(section["seconds"] > 0 for section in value["sections"])


def test_a_wrong_backend_fails_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ForgetsALevel)
    assert issubclass(ForgetsALevel, TorchAttentionBackend)
    report = validate(folder, OPTIONS, effort=EFFORT)
    assert not report.passed
    assert [section.passed for section in report.sections[:2]] == [False, False]


def test_dummy_weights_are_validated_as_far_as_they_can_be(folder: Path) -> None:
    report = validate(folder, {**OPTIONS, "load_format": "dummy"}, effort=EFFORT)
    assert report.passed
    assert report.sections[2].checks[0].verdict == "skipped"


def test_progress_is_told(folder: Path) -> None:
    told: list[str] = []
    validate(folder, OPTIONS, effort=EFFORT, progress=lambda what, done, total: told.append(what))
    assert "cascade on, warm cache" in told
    assert "transformers in float32" in told


def test_the_pool_holds_heads_that_several_ranks_have(folder: Path) -> None:
    """The model has 2 KV heads: each of 6 ranks holds a whole one."""
    checkpoint = open_checkpoint(folder)
    config = model_config_from_hf(checkpoint.hf_config())
    pools = [
        _engine_options({**OPTIONS, "tensor_parallel_size": count}, config, EFFORT).kv_cache_bytes or 0
        for count in (1, 2, 6)
    ]
    assert pools[0] == pools[1] > 0
    assert pools[2] == 3 * pools[0]


def test_options_that_validation_sets_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="validation sets max_num_seqs itself"):
        validate(folder, {"max_num_seqs": 4}, effort=EFFORT)


def test_a_model_of_a_short_context_is_told_so(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, max_position_embeddings=64)
    with pytest.raises(ConfigError, match="validation reads 89 tokens, the model was made for 64: use quick"):
        validate(folder, OPTIONS, effort=QUICK)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ModelNotFoundError):
        validate("nowhere", {}, effort=EFFORT)


def test_nothing_checked_is_not_passed() -> None:
    skipped = Check(name="a", passed=None)
    assert not ValidationReport({}, [Section("s", [skipped])]).passed
    assert ValidationReport({}, [Section("s", [skipped, Check(name="b", passed=True)])]).passed
    assert not ValidationReport(
        {}, [Section("s", [Check(name="c", passed=False), Check(name="b", passed=True)])]
    ).passed
