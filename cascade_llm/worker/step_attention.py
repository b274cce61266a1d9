"""Attention of one step, as the decoder calls it."""

from __future__ import annotations

import torch

from cascade_llm.attention.backend import AttentionBackend, PreparedAttention

__all__ = ["StepAttention"]


class StepAttention:
    """Write a layer's K/V, then read."""

    def __init__(self, prepared: PreparedAttention, backend: AttentionBackend, slots: torch.Tensor) -> None:
        """`slots`: [rows] of the backend's `slot_dtype`, where the rows' K/V go."""
        self._prepared, self._backend, self._slots = prepared, backend, slots

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `attention.backend.Attention`."""
        self._backend.write(layer, k, v, self._slots)
        return self._prepared.attend(layer, q)[0]
