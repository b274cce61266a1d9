"""Attention backends that are wrong in one way each, to show that validation notices."""

from __future__ import annotations

import math

import pytest
import torch

from cascade_llm.attention import select
from cascade_llm.attention.backend import PreparedAttention
from cascade_llm.attention.torch_backend import TorchAttentionBackend
from cascade_llm.plan import CascadeLevel, CascadePlan, int_column

Answer = tuple[torch.Tensor, torch.Tensor]


class ForgetsALevel(TorchAttentionBackend):
    """Leaves out the coarsest shared level."""

    def prepare(self, plan: CascadePlan) -> PreparedAttention:
        kept = plan.levels[1:] if plan.shared_levels else plan.levels
        return super().prepare(CascadePlan(kept, plan.page_size, plan.window_len))


class ReadsTooMuch(TorchAttentionBackend):
    """Takes the last page of every shared segment for the first one."""

    def prepare(self, plan: CascadePlan) -> PreparedAttention:
        wrong = tuple(map(_first_page_last, plan.shared_levels))
        return super().prepare(CascadePlan((*wrong, plan.leaf), plan.page_size, plan.window_len))


class NaturalLogarithm(TorchAttentionBackend):
    """Gives its log-sum-exp to the base e."""

    def prepare(self, plan: CascadePlan) -> PreparedAttention:
        return _InNaturalLogarithm(super().prepare(plan))


class _InNaturalLogarithm(PreparedAttention):
    def __init__(self, inner: PreparedAttention) -> None:
        self._inner = inner

    def attend(self, layer: int, q: torch.Tensor) -> Answer:
        out, lse = self._inner.attend(layer, q)
        return out, lse * math.log(2.0)


class NotANumber(TorchAttentionBackend):
    """Gives NaN for the first row."""

    def prepare(self, plan: CascadePlan) -> PreparedAttention:
        return _WithNaN(super().prepare(plan))


class _WithNaN(PreparedAttention):
    def __init__(self, inner: PreparedAttention) -> None:
        self._inner = inner

    def attend(self, layer: int, q: torch.Tensor) -> Answer:
        out, lse = self._inner.attend(layer, q)
        out[0] = torch.nan
        return out, lse


FAULTS = (ForgetsALevel, ReadsTooMuch, NaturalLogarithm, NotANumber)


def install(monkeypatch: pytest.MonkeyPatch, fault: type[TorchAttentionBackend]) -> None:
    """Let the wrong backend serve wherever "torch" is asked for."""
    monkeypatch.setitem(select.BACKENDS, "torch", fault)


def _first_page_last(level: CascadeLevel) -> CascadeLevel:
    pages = level.kv_page_indices.tolist()
    for segment in range(level.num_segments):
        begin, end = level.kv_page_indptr[segment], level.kv_page_indptr[segment + 1]
        if end > begin:
            pages[end - 1] = pages[begin] if end > begin + 1 else (pages[begin] + 1) % (max(pages) + 1)
    return CascadeLevel(level.qo_indptr, level.kv_page_indptr, int_column(pages), level.kv_last_page_len)
