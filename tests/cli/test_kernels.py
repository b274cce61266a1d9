"""`cascade-llm kernels`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer import kernels as flashinfer_kernels
from cascade_llm.attention.flashinfer.kernels import BuiltKernel
from tests.cli.conftest import Run
from tests.engine.tiny_llm import save_tiny


def test_list_says_where_it_looked(run: Run, tmp_path: Path) -> None:
    result = run("kernels", "list", "--output", tmp_path / "none")
    assert result.exit_code == 0
    assert "no kernels in" in result.output


def test_list_as_json(run: Run, tmp_path: Path) -> None:
    entry = {"name": "page", "purpose": "appending to pages", "seconds": 1.5, "num_bytes": 10, "error": None}
    (tmp_path / "kernels.json").write_text(json.dumps([entry]))
    result = run("kernels", "list", "--output", tmp_path, "--json")
    assert json.loads(result.output) == {"folder": str(tmp_path), "kernels": [entry]}


def test_build_reads_the_model_and_fails_where_a_kernel_does(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def build(spec: AttentionSpec, arch: str, folder: Path, on_kernel: object) -> list[BuiltKernel]:
        asked.append((spec.head_dim, spec.num_qo_heads, spec.num_kv_heads, str(spec.dtype), arch, folder))
        return [BuiltKernel("page", "appending", 2.0, 1000), BuiltKernel("norm", "norms", 1.0, error="no header")]

    monkeypatch.setattr(flashinfer_kernels, "build_kernels", build)
    model = save_tiny(tmp_path / "model", "qwen3", head_dim=64)
    result = run("kernels", "build", model, "--dtype", "float16", "--output", tmp_path / "out")
    assert result.exit_code == 1
    assert asked == [(64, 6, 2, "torch.float16", "9.0a", tmp_path / "out")]
    assert "no header" in result.stderr
    assert "1 kB" in result.stdout
