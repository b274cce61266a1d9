from __future__ import annotations

import pytest
import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.select import select_backend
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.errors import BackendError


def spec(num_qo_heads: int = 4, dtype: torch.dtype = torch.float32) -> AttentionSpec:
    return AttentionSpec(
        num_layers=1,
        num_qo_heads=num_qo_heads,
        num_kv_heads=2,
        head_dim=8,
        sm_scale=1.0,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def test_auto_takes_torch_and_says_why_not_flashinfer() -> None:
    choice = select_backend("auto", spec())
    assert choice.name == "torch"
    assert choice.backend is TorchAttentionBackend
    assert [name for name, _ in choice.refused] == ["flashinfer"]


def test_torch_by_name_refuses_nothing() -> None:
    assert select_backend("torch", spec()).refused == ()


def test_flashinfer_by_name_names_reason_and_cure() -> None:
    with pytest.raises(BackendError, match=r"flashinfer: not implemented yet.*'auto'"):
        select_backend("flashinfer", spec())


def test_every_reason_is_listed() -> None:
    with pytest.raises(BackendError, match=r"flashinfer: .*torch: .*int8; torch: 3 query heads"):
        select_backend("auto", spec(num_qo_heads=3, dtype=torch.int8))


def test_unknown_name() -> None:
    with pytest.raises(BackendError, match="unknown attention backend 'triton'"):
        select_backend("triton", spec())
