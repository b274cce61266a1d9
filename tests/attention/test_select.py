from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.flashinfer import ops as flashinfer_ops
from cascade_llm.attention.flashinfer.ops import shape_reasons
from cascade_llm.attention.native_backend import NativeAttentionBackend
from cascade_llm.attention.native_kernels import kernels_for
from cascade_llm.attention.select import select_backend
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.errors import BackendError
from tests.native_code import needs_compiler


def spec(num_qo_heads: int = 4, dtype: torch.dtype = torch.float32, head_dim: int = 8) -> AttentionSpec:
    return AttentionSpec(
        num_layers=1,
        num_qo_heads=num_qo_heads,
        num_kv_heads=2,
        head_dim=head_dim,
        sm_scale=1.0,
        dtype=dtype,
        device=torch.device("cpu"),
    )


@needs_compiler
def test_auto_takes_the_native_kernels_and_says_why_not_flashinfer() -> None:
    choice = select_backend("auto", spec())
    assert choice.name == "native"
    assert choice.backend is NativeAttentionBackend
    assert {name for name, _ in choice.refused} == {"flashinfer"}
    assert "native" in choice.describe()
    assert "needs a CUDA GPU" in choice.describe()


def test_without_a_compiler_auto_takes_torch_and_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    kernels_for.cache_clear()
    choice = select_backend("auto", spec())
    assert choice.name == "torch"
    assert choice.backend is TorchAttentionBackend
    assert {name for name, _ in choice.refused} == {"flashinfer", "native"}
    assert "none of gcc, clang, cc was found" in choice.describe()


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        ({"dtype": torch.float16}, "not float16"),
        ({"head_dim": 9}, "head_dim is 9"),
        ({"sm_scale": 0.0}, "sm_scale"),
        ({"num_qo_heads": 2 * 200}, "200 query heads per KV head"),
        ({"device": torch.device("cuda")}, "is for the CPU"),
    ],
)
def test_what_the_native_kernels_do_not_serve(refused: dict[str, Any], words: str) -> None:
    with pytest.raises(BackendError, match=words):
        select_backend("native", dataclasses.replace(spec(), **refused))


def test_torch_by_name_refuses_nothing() -> None:
    choice = select_backend("torch", spec())
    assert choice.refused == ()
    assert choice.describe() == "attention backend: torch"


def test_flashinfer_by_name_lists_every_reason_and_the_cure() -> None:
    with pytest.raises(BackendError, match="flashinfer") as caught:
        select_backend("flashinfer", spec(num_qo_heads=5))
    for part in ("needs a CUDA GPU, the device is cpu", "not float32", "head_dim is 8", "5 query heads", "'auto'"):
        assert part in str(caught.value)


def test_missing_and_untested_packages_are_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise flashinfer_ops.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flashinfer_ops.importlib.metadata, "version", missing)
    assert any("not installed" in reason for _, reason in select_backend("auto", spec()).refused)
    monkeypatch.setattr(flashinfer_ops.importlib.metadata, "version", lambda name: "0.1")
    assert any("0.1 is untested" in reason for _, reason in select_backend("auto", spec()).refused)


def test_an_old_gpu_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    on_gpu = dataclasses.replace(spec(dtype=torch.bfloat16, head_dim=64), device=torch.device("cuda"))
    assert any("the GPU has 7.5" in reason for _, reason in select_backend("auto", on_gpu).refused)


def test_shapes_that_no_kernel_serves() -> None:
    assert shape_reasons(spec(dtype=torch.bfloat16, head_dim=128)) == []
    assert shape_reasons(spec(num_qo_heads=66, dtype=torch.bfloat16, head_dim=128)) != []


def test_unknown_backend() -> None:
    with pytest.raises(BackendError, match="auto, flashinfer, native, torch"):
        select_backend("triton", spec())
