"""Building kernels ahead of time, with modules that compile at once in place of FlashInfer's."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer import kernels as flashinfer_kernels
from cascade_llm.attention.flashinfer import ops
from cascade_llm.attention.flashinfer.kernels import (
    build_kernels,
    kernel_folder,
    list_kernels,
    module_purposes,
    reasons_against_flashinfer,
)
from cascade_llm.attention.flashinfer.ops import JitModule, jit_modules
from cascade_llm.device import cuda_toolkit
from cascade_llm.errors import BackendError

SPEC = AttentionSpec(
    num_layers=1,
    num_qo_heads=32,
    num_kv_heads=8,
    head_dim=128,
    sm_scale=1.0,
    dtype=torch.bfloat16,
    device=torch.device("cpu"),
)


class Compiler:
    """Two modules; the second fails until it is mended."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.broken = cache, True
        self.built: list[str] = []
        self.asked: list[tuple[AttentionSpec, tuple[str, ...]]] = []
        self.arch: str | None = None

    def modules(self, spec: AttentionSpec, kernels: tuple[str, ...]) -> list[JitModule]:
        self.asked.append((spec, kernels))
        self.arch = os.environ["FLASHINFER_CUDA_ARCH_LIST"]
        return [JitModule(name, f"for {name}", self._build(name), self.cache / f"{name}.so") for name in ("a", "b")]

    def _build(self, name: str) -> Callable[[], None]:
        def build() -> None:
            if name == "b" and self.broken:
                raise RuntimeError("nvcc: error: a header is missing")
            (self.cache / f"{name}.so").write_bytes(b"code of " + name.encode())
            self.built.append(name)

        return build


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler(tmp_path)
    monkeypatch.setattr(flashinfer_kernels, "jit_modules", found.modules)
    monkeypatch.setattr(flashinfer_kernels, "package_reasons", list)
    monkeypatch.setattr(flashinfer_kernels, "toolkit_reasons", list)
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: tmp_path / "bin" / "nvcc")
    return found


def test_builds_what_serves_the_model_and_keeps_the_environment(compiler: Compiler, tmp_path: Path) -> None:
    before, seen = dict(os.environ), []
    folder = tmp_path / "out"
    kernels = build_kernels(SPEC, "9.0a", folder, on_kernel=lambda *progress: seen.append(progress))
    assert compiler.asked == [(SPEC, ("prefill_fa2", "decode_tensor_cores"))]
    assert compiler.arch == "9.0a"
    assert dict(os.environ) == before
    assert seen == [("for a", 0, 2), ("for b", 1, 2)]
    assert (folder / "a" / "a.so").read_bytes() == b"code of a"
    assert [kernel.error is None for kernel in kernels] == [True, False]
    assert "header is missing" in str(kernels[1].error)
    assert not (folder / "b").exists()


def test_eight_bit_pages_have_modules_of_their_own(compiler: Compiler, tmp_path: Path) -> None:
    build_kernels(replace(SPEC, kv_dtype=torch.float8_e4m3fn), "9.0a", tmp_path / "out")
    assert [asked.page_dtype for asked, _ in compiler.asked] == [torch.float8_e4m3fn]
    with pytest.raises(BackendError, match=r"head_dim 64.*kv_cache_dtype"):
        build_kernels(replace(SPEC, head_dim=64, kv_dtype=torch.float8_e4m3fn), "9.0a", tmp_path / "out")


def test_a_second_run_builds_only_what_is_missing(compiler: Compiler, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    build_kernels(SPEC, "9.0a", folder)
    compiler.broken = False
    kernels = build_kernels(SPEC, "9.0a", folder)
    assert compiler.built == ["a", "b"]
    assert [kernel.error for kernel in kernels] == [None, None]
    assert list_kernels(folder) == kernels
    assert {kernel.num_bytes for kernel in kernels} == {len(b"code of a")}
    assert list_kernels(tmp_path / "nowhere") == []


def test_every_reason_is_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cuda_toolkit, "find_nvcc", lambda: None)
    monkeypatch.setattr(flashinfer_kernels, "package_reasons", lambda: ["no package"])
    with pytest.raises(BackendError, match=r"no package.*no nvcc.*CUDA_HOME"):
        build_kernels(SPEC, "9.0a", tmp_path)


def test_folder_is_below_the_cache_that_the_user_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASCADE_LLM_CACHE", str(tmp_path))
    assert kernel_folder("9.0a").is_relative_to(tmp_path)
    monkeypatch.delenv("CASCADE_LLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert kernel_folder("9.0a").is_relative_to(tmp_path / "xdg" / "cascade-llm")


def on_gpu(monkeypatch: pytest.MonkeyPatch, cache: Path) -> AttentionSpec:
    """A Hopper GPU and a package that imports, but neither kernels nor a compiler."""
    monkeypatch.setenv("CASCADE_LLM_CACHE", str(cache))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flashinfer_kernels, "package_reasons", list)
    monkeypatch.setattr(flashinfer_kernels, "load_flashinfer_ops", lambda prebuilt: None)
    monkeypatch.setattr(flashinfer_kernels, "find_nvcc", lambda: None)
    return replace(SPEC, device=torch.device("cuda"))


def test_kernels_that_are_missing_and_cannot_be_compiled_are_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = on_gpu(monkeypatch, tmp_path)
    assert "cascade-llm kernels build" in reasons_against_flashinfer(spec)[0]
    states = flashinfer_kernels.kernel_states(spec, "9.0a")
    for name in (state.name for state in states if state.name != "page"):
        (kernel_folder("9.0a") / name).mkdir(parents=True)
        (kernel_folder("9.0a") / name / f"{name}.so").write_bytes(b"code")
    (reason,) = reasons_against_flashinfer(spec)
    assert "(appending to pages)" in reason
    monkeypatch.setattr(flashinfer_kernels, "find_nvcc", lambda: tmp_path / "nvcc")
    assert reasons_against_flashinfer(spec) == []
    monkeypatch.setattr(flashinfer_kernels, "find_nvcc", lambda: None)
    (kernel_folder("9.0a") / "page").mkdir()
    (kernel_folder("9.0a") / "page" / "page.so").write_bytes(b"code")
    assert reasons_against_flashinfer(spec) == []
    eight_bits = replace(spec, kv_dtype=torch.float8_e4m3fn)
    assert "are not built" in reasons_against_flashinfer(eight_bits)[0], "pages of 8 bits have kernels of their own"


def test_a_package_that_cannot_be_imported_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = on_gpu(monkeypatch, tmp_path)

    def broken(prebuilt: Path | None) -> None:
        raise BackendError("FlashInfer cannot be imported (libcudart.so.13)")

    monkeypatch.setattr(flashinfer_kernels, "find_nvcc", lambda: tmp_path / "nvcc")
    monkeypatch.setattr(flashinfer_kernels, "load_flashinfer_ops", broken)
    assert reasons_against_flashinfer(spec) == ["FlashInfer cannot be imported (libcudart.so.13)"]


PROVIDERS = """
from types import SimpleNamespace as Provider
def get_jit_cache_providers():
    return [
        Provider(jit_cache_dir={hopper!r}, cuda_architectures=["sm90a"], modules=["page", "rope", "gone"]),
        Provider(jit_cache_dir={ampere!r}, cuda_architectures=["sm80"], modules=["page"]),
    ]
"""


def test_states_of_the_modules_that_a_model_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Our folder first, then whatever the package's providers have for the architecture, wherever they lie."""
    monkeypatch.setenv("CASCADE_LLM_CACHE", str(tmp_path / "cache"))
    hopper, ampere, package = tmp_path / "hopper", tmp_path / "elsewhere", tmp_path / "package"
    for folder, name in ((hopper, "page"), (hopper, "rope"), (ampere, "page"), (kernel_folder("9.0a"), "rope")):
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.so").write_bytes(b"code")

    def there(arch: str) -> dict[str, str]:
        return {s.name: s.state for s in flashinfer_kernels.kernel_states(SPEC, arch) if s.state != "missing"}

    assert there("9.0a") == {"rope": "built"}
    (package / "flashinfer_jit_cache").mkdir(parents=True)
    text = PROVIDERS.format(hopper=str(hopper), ampere=str(ampere))
    (package / "flashinfer_jit_cache" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setitem(sys.modules, "flashinfer_jit_cache", None)  # taken out again behind the test
    del sys.modules["flashinfer_jit_cache"]
    assert there("9.0a") == {"rope": "built", "page": "prebuilt"}
    assert there("8.9") == {"page": "prebuilt"}
    assert there("10.0a") == {}
    assert flashinfer_kernels.kernel_states(replace(SPEC, dtype=torch.float32), "9.0a") == []


@pytest.mark.parametrize(
    ("window_lens", "expected"),
    [
        ((None,), ["decode_cuda_cores", "decode_tensor_cores, prefill_fa2"]),
        (
            (None, 128),
            [
                "decode_cuda_cores",
                "decode_cuda_cores with a window",
                "decode_tensor_cores with a window, prefill_fa2 with a window",
                "decode_tensor_cores, prefill_fa2",
            ],
        ),
        (
            (4096,),
            [
                "decode_cuda_cores with a window",
                "decode_tensor_cores with a window, prefill_fa2 with a window",
                "prefill_fa2",
            ],
        ),
    ],
)
def test_leaves_with_windows_are_modules_of_their_own(window_lens: tuple[int | None, ...], expected: list[str]) -> None:
    kernels = ("prefill_fa2", "decode_tensor_cores", "decode_cuda_cores")
    purposes = module_purposes(replace(SPEC, window_lens=window_lens), kernels)
    assert sorted(purpose for name, purpose in purposes.items() if "kv_cache" in name) == expected
    for name, purpose in purposes.items():
        assert ("use_swa_True" in name) == ("with a window" in purpose)


@pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="flashinfer is not installed here")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("soft_cap", [None, 50.0])
@pytest.mark.parametrize("window_lens", [(None,), (None, 128), (4096,)])
def test_names_are_those_of_the_installed_package(
    head_dim: int,
    kv_dtype: torch.dtype,
    soft_cap: float | None,
    window_lens: tuple[int | None, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    kernels = ("prefill_fa2", "decode_tensor_cores", "decode_cuda_cores")
    spec = replace(SPEC, head_dim=head_dim, kv_dtype=kv_dtype, logits_soft_cap=soft_cap, window_lens=window_lens)
    theirs = {module.name: module.purpose for module in jit_modules(spec, kernels)}
    assert module_purposes(spec, kernels) == theirs


@pytest.mark.parametrize(
    ("has_nvcc", "has_norm", "expected"), [(False, False, None), (True, False, "1"), (False, True, "1")]
)
def test_norms_are_by_cuda_where_that_costs_no_process_a_compilation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_nvcc: bool, has_norm: bool, expected: str | None
) -> None:
    monkeypatch.setenv("FLASHINFER_USE_CUDA_NORM", "")
    monkeypatch.delenv("FLASHINFER_USE_CUDA_NORM")
    monkeypatch.setattr(ops, "find_nvcc", lambda: tmp_path / "nvcc" if has_nvcc else None)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    if has_norm:
        (tmp_path / "norm").mkdir()
    with pytest.raises(BackendError, match="cannot be imported"):
        ops.load_flashinfer_ops(tmp_path)
    assert os.environ.get("FLASHINFER_USE_CUDA_NORM") == expected
