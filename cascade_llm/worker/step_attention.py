"""Attention of one step, as the decoder calls it: each layer reads by the plan of its own attention kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.attention.backend import AttentionBackend, PreparedAttention

__all__ = ["StepAttention"]


class StepAttention:
    """Write a layer's K/V, then read."""

    def __init__(
        self,
        prepared: Sequence[PreparedAttention],
        backend: AttentionBackend,
        slots: torch.Tensor,
        layer_kinds: Sequence[int] = (),
    ) -> None:
        """Join what a step's layers share.

        Args:
            prepared: one per attention kind
            backend: that prepared them
            slots: [rows] of the backend's `slot_dtype`, where the rows' K/V go
            layer_kinds: [layers] index into `prepared`; empty: all layers the first
        """
        self._prepared, self._backend, self._slots, self._kinds = prepared, backend, slots, layer_kinds

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `attention.backend.Attention`."""
        self._backend.write(layer, k, v, self._slots)
        return self._prepared[self._kinds[layer] if self._kinds else 0].attend(layer, q)[0]
