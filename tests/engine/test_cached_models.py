from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm.config import EngineOptions
from cascade_llm.device.devices import resolve_dtype
from cascade_llm.engine.cached_models import CachedReport, describe_cache
from cascade_llm.loader.huggingface import HuggingFaceHub
from cascade_llm.loader.modelscope import ModelScopeHub
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.worker.worker import build_worker
from tests.loader.gguf_files import write_model
from tests.models.checkpoints import tiny_model

COMMIT, OTHER = "0" * 40, "1" * 40


class HubAt(HuggingFaceHub):
    """Its cache is a folder of the test."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def cache_folder(self) -> Path:
        return self._folder


class ModelScopeAt(ModelScopeHub):
    def __init__(self, folder: Path) -> None:
        self._cache = folder

    @property
    def cache_folder(self) -> Path:
        return self._cache


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("qwen3").save_pretrained(folder, max_shard_size="50KB")
    return folder


def cached(cache: Path, name: str, source: Path, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """As the hub's client leaves a repository behind."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    shutil.copytree(source, folder)
    if ref is not None:
        (repository / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
    return folder


def reports(cache: Path) -> dict[str, CachedReport]:
    return {report.model: report for report in describe_cache([HubAt(cache)])}


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_caches_without_models_compile_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade_llm.engine.cached_models.weight_support", lambda: pytest.fail("kernels were asked"))
    assert list(describe_cache([HubAt(tmp_path), ModelScopeAt(tmp_path / "none")])) == []


def test_what_is_served(tiny: Path, tmp_path: Path) -> None:
    cached(tmp_path, "org/tiny", tiny)
    cached(tmp_path, "org/tiny", tiny, OTHER, "refs/pr/1")
    cached(tmp_path, "org/no-refs", tiny, ref=None)
    found = reports(tmp_path)
    assert list(found) == [f"org/no-refs@{COMMIT}", "org/tiny", "org/tiny@refs/pr/1"]
    report = found["org/tiny"]
    weights = sum(path.stat().st_size for path in tiny.glob("*.safetensors"))
    assert report.reason is None
    assert (report.format, report.quantization, report.architecture) == ("safetensors", None, "Qwen3ForCausalLM")
    assert (report.revision, found["org/tiny@refs/pr/1"].revision) == (COMMIT, OTHER)
    assert report.num_bytes == sum(path.stat().st_size for path in tiny.iterdir())
    assert 0.9 * weights < sum(report.types.values()) < weights
    assert report.pool_bytes is not None
    assert report.pool_bytes > 0
    assert report.last_used > 1.7e9


def test_what_is_not_served_says_why(tiny: Path, tmp_path: Path) -> None:
    change_config(cached(tmp_path, "org/other", tiny), architectures=["MambaForCausalLM"])
    folder = cached(tmp_path, "org/half", tiny)
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-9])
    next(cached(tmp_path, "org/less", tiny).glob("*-00003-*.safetensors")).unlink()
    pickled = cached(tmp_path, "org/pickled", tiny)
    for path in pickled.glob("*.safetensors*"):
        path.unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"0")
    found = reports(tmp_path)
    for name, reason in (
        ("other", "MambaForCausalLM is not implemented"),
        ("half", "not a whole safetensors file"),
        ("less", "is missing"),
        ("pickled", "runs code when it is loaded"),
    ):
        report = found[f"org/{name}"]
        assert reason in (report.reason or ""), name
        assert "\n" not in (report.reason or "")
        assert report.weights_bytes is None
        assert report.architecture is not None


def test_each_gguf_file_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "files" / "Q8"
    folder.mkdir(parents=True)
    write_model(folder / "tiny.gguf", tiny_model("llama"))
    (folder.parent / "broken.gguf").write_bytes(b"GGUF")
    cached(tmp_path, "org/tiny-GGUF", folder.parent)
    found = reports(tmp_path)
    assert list(found) == ["org/tiny-GGUF:Q8/tiny.gguf", "org/tiny-GGUF:broken.gguf"]
    assert found["org/tiny-GGUF:Q8/tiny.gguf"].reason is None
    assert found["org/tiny-GGUF:Q8/tiny.gguf"].format == "GGUF"
    assert "truncated" in (found["org/tiny-GGUF:broken.gguf"].reason or "")


def test_modelscope_s_layouts(tiny: Path, tmp_path: Path) -> None:
    for place in ("models/org--new/snapshots/master", "models/org--new/snapshots/v1", "hub/models/org/old___1"):
        shutil.copytree(tiny, tmp_path / place)
    found = [(report.model, report.revision, report.reason) for report in describe_cache([ModelScopeAt(tmp_path)])]
    assert found == [
        ("ms://org/new", "master", None),
        ("ms://org/new@v1", "v1", None),
        ("ms://org/old.1", "old___1", None),
    ]


def test_an_empty_cache(tmp_path: Path) -> None:
    assert reports(tmp_path / "none") == {}


@pytest.mark.parametrize("is_gguf", [True, False], ids=["smollm2", "safetensors"])
def test_the_estimate_is_near_what_the_weights_take(tiny: Path, tmp_path: Path, is_gguf: bool) -> None:
    source = tmp_path / "smollm2"
    if is_gguf:
        path = open_checkpoint("smollm2").tokenizer_source
        assert path is not None
        source.mkdir()
        (source / "smollm2.gguf").symlink_to(path)
    else:
        tiny_model(
            "llama",
            hidden_size=256,
            intermediate_size=512,
            vocab_size=2048,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
        ).save_pretrained(source)
    cached(tmp_path, "org/model", source)
    (report,) = reports(tmp_path).values()
    assert report.weights_bytes is not None
    runner, facts = build_worker(
        EngineOptions(max_model_len=64, kv_cache_bytes=1 << 23, max_num_seqs=2), open_checkpoint(report.path)
    )
    assert facts.dtype == resolve_dtype("auto", "float32", torch.device("cpu"))
    decoder = runner.decoder
    matrices = {id(linear.matrix): linear.matrix for linear in decoder.linears}
    matrices[id(decoder.embedding.matrix)] = decoder.embedding.matrix
    held = sum(matrix.num_bytes for matrix in matrices.values())
    assert 0.9 * held < report.weights_bytes < 1.1 * held
