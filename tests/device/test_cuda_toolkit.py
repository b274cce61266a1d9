"""The CUDA toolkit that kernels are compiled with: found, and what it lacks named with its cure."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cascade_llm.device import cuda_toolkit
from cascade_llm.device.cuda_toolkit import build_environment, find_nvcc, toolkit_reasons

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="its preprocessor stands in for nvcc's")


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit of a compiler alone, whose preprocessor is gcc's."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda.h").write_text("")
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\nexec gcc -nostdinc -I"{home}/include" -x c "$@"\n')
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setattr(cuda_toolkit, "_header_folders", list)
    return home


def test_nvcc_is_found_where_flashinfer_looks(toolkit: Path) -> None:
    assert find_nvcc() == toolkit / "bin" / "nvcc"


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: None)
    (reason,) = toolkit_reasons()
    assert "CUDA_HOME" in reason


@needs_gcc
def test_headers_that_a_small_toolkit_lacks_are_named_with_their_packages(toolkit: Path) -> None:
    (reason,) = toolkit_reasons()
    assert "cublasLt.h" in reason
    assert reason.endswith(": pip install nvidia-cublas nvidia-curand")
    (toolkit / "include" / "cublasLt.h").write_text("")
    (reason,) = toolkit_reasons()
    assert "cublasLt.h" not in reason
    assert reason.endswith(": pip install nvidia-curand")
    (toolkit / "include" / "curand.h").write_text("")
    assert toolkit_reasons() == []


@needs_gcc
def test_headers_of_packages_are_found_and_handed_to_the_build(
    toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "nvidia" / "cu13" / "include"
    package.mkdir(parents=True)
    for header in cuda_toolkit.HEADER_PACKAGES:
        (package / header).write_text("")
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    assert toolkit_reasons() == []
    before = dict(os.environ)
    with build_environment("9.0a"):
        assert os.environ["FLASHINFER_CUDA_ARCH_LIST"] == "9.0a"
        assert f"-I{package}" in os.environ["FLASHINFER_EXTRA_CUDAFLAGS"].split()
        assert f"-I{package}" in os.environ["FLASHINFER_EXTRA_CFLAGS"].split()
        (stubs,) = os.environ["FLASHINFER_EXTRA_LDFLAGS"].split()
        assert (Path(stubs.removeprefix("-L")) / "libcuda.so").exists()
    assert dict(os.environ) == before
