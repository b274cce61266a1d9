"""Backends against float64: the healthy one passes, every wrong one is found."""

from __future__ import annotations

import pytest
import torch

from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.config import ModelConfig
from cascade_llm.validation.attention_check import FAMILIES, check_attention
from cascade_llm.validation.attention_error import AttentionError
from cascade_llm.validation.report import Check
from tests.validation.faults import FAULTS, install

MODEL = ModelConfig(
    architecture="llama",
    vocab_size=97,
    hidden_size=48,
    intermediate_size=80,
    num_layers=2,
    num_qo_heads=6,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def run(cases_per_family: int = 4) -> list[Check]:
    told: list[tuple[int, int]] = []
    checks = check_attention(
        MODEL,
        torch.device("cpu"),
        cases_per_family=cases_per_family,
        seed=0,
        progress=lambda what, done, total: told.append((done, total)),
    )
    assert told == [(i, told[0][1]) for i in range(told[0][1])]
    return checks


def test_the_torch_backend_passes_every_family_in_both_dtypes() -> None:
    checks = [check for check in run() if check.name.startswith("torch,")]
    assert len(checks) == 2 * len(FAMILIES)
    for check in checks:
        assert check.passed, check
        assert 0 < check.figures["out"] < check.figures["tolerance"]
        assert 0 < check.figures["lse"] < check.figures["tolerance"]
        assert check.figures["plans"] == 8


def test_a_backend_that_cannot_run_here_is_one_line_with_its_reasons() -> None:
    if torch.cuda.is_available():
        pytest.skip("flashinfer may run here")
    (check,) = [check for check in run(1) if check.name.startswith("flashinfer")]
    assert check.verdict == "skipped"
    assert "needs a CUDA GPU" in check.note


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_backend_fails(monkeypatch: pytest.MonkeyPatch, fault: type[TorchAttentionBackend]) -> None:
    install(monkeypatch, fault)
    failed = [check for check in run() if check.passed is False]
    assert failed
    assert all(check.note.startswith("worst: page_size") for check in failed)


def test_not_a_number_is_an_infinite_error() -> None:
    error = AttentionError()
    zeros = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    error.add((torch.full((2, 3, 4), torch.nan), torch.zeros(2, 3)), zeros)
    assert error.out == float("inf")
    assert error.lse == 0.0
    assert not error.within(1e9)
