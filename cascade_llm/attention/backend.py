"""What every attention backend is.

A backend reads a `CascadePlan` and knows nothing else about scheduling. Per step `prepare` turns the plan into
whatever the backend needs (device index tensors, kernel plans); per layer `attend` computes attention of all rows.
Levels that are the same object as in an earlier step keep what was derived from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from cascade_llm.attention.head_shares import HeadShares
from cascade_llm.attention.sinks import apply_sinks
from cascade_llm.config import ModelConfig
from cascade_llm.device.ranks import Ranks
from cascade_llm.kv_cache.page_dtypes import bytes_per_number
from cascade_llm.kv_cache.paged_kv_cache import KVLayout, PagedKVCache
from cascade_llm.plan import CascadePlan, IntColumn

__all__ = ["Attention", "AttentionBackend", "AttentionSpec", "PreparedAttention", "StepAttention", "column_tensor"]


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The shape of a model's attention."""

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    sm_scale: float
    dtype: torch.dtype
    device: torch.device
    kv_dtype: torch.dtype | None = None
    """Of the pages, where it is not `dtype`."""
    logits_soft_cap: float | None = None
    """A score s = q·k * sm_scale becomes cap * tanh(s / cap) before it is masked (Gemma 2)."""
    window_lens: tuple[int | None, ...] = (None,)
    """Of the model's attention kinds."""

    @classmethod
    def for_model(
        cls,
        model: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        kv_dtype: torch.dtype | None = None,
        ranks: Ranks | None = None,
    ) -> AttentionSpec:
        """The attention of a model that computes in `dtype` on `device`, or one rank's part of it.

        Raises `ConfigError` where the heads cannot be shared out.
        """
        heads = HeadShares.of(model, ranks or Ranks())
        return cls(
            num_layers=model.num_layers,
            num_qo_heads=heads.qo.size,
            num_kv_heads=heads.kv.size,
            head_dim=model.head_dim,
            sm_scale=model.sm_scale,
            dtype=dtype,
            device=device,
            kv_dtype=kv_dtype,
            logits_soft_cap=model.attention_soft_cap,
            window_lens=model.attention_kinds,
        )

    @property
    def page_dtype(self) -> torch.dtype:
        """What K and V are stored in."""
        return self.dtype if self.kv_dtype is None else self.kv_dtype

    @property
    def kv_number_bytes(self) -> float:
        """Bytes of a number of K or V, its share of a scale included."""
        return bytes_per_number(self.page_dtype, self.head_dim)

    @property
    def group_size(self) -> int:
        """Query heads per KV head (gqa)."""
        return self.num_qo_heads // self.num_kv_heads


class Attention(Protocol):
    """What a decoder layer is given: attention of one step, every layer through the same object."""

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Write k and v, then attend.

        Args:
            layer: index of the layer
            q: [rows, num_qo_heads, head_dim], after RoPE
            k, v: [rows, num_kv_heads, head_dim]
            sinks: [num_qo_heads] float32, the score of a key without a value beside those of each row

        Returns:
            [rows, num_qo_heads, head_dim]
        """
        ...


class PreparedAttention(ABC):
    """One step's plan, ready for a backend's kernels."""

    on_part: Callable[[str, float], None] | None = None
    """Called in each layer as `on_part(part, share)` when a part is done: "suffix attention", then "shared attention"
    where levels are shared. `share`: the part of the time since the last call that belongs to it. For measurements."""

    @abstractmethod
    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of all rows over the pages that the plan names, in one layer.

        Args:
            q: [rows, num_qo_heads, head_dim]

        Returns:
            out [rows, num_qo_heads, head_dim], q's dtype; lse [rows, num_qo_heads], float32, base 2
        """

    def take_over(self, other: PreparedAttention) -> None:
        """Stand for another step's plan of as many rows, from now on; where the backend `can_be_recorded`."""
        raise NotImplementedError


class AttentionBackend(ABC):
    """Attention over a paged KV cache for one model on one device."""

    slot_dtype = torch.int64
    """What `write` takes slots in."""
    can_be_recorded = False
    """Whether what `write` and `attend` call may be called again, with another step's plan in the first one's place."""

    def __init__(self, spec: AttentionSpec, kv_cache: PagedKVCache) -> None:
        self.spec = spec
        self.kv_cache = kv_cache

    @staticmethod
    @abstractmethod
    def preferred_layout(device: torch.device) -> KVLayout:
        """The pool's layout that this backend reads fastest on that kind of device."""

    def num_slots(self, plan: CascadePlan) -> int:
        """Tokens that a layer's pool holds in the layers that read by a plan."""
        has_pools = len(self.kv_cache.kind_pages) > 1
        return self.kv_cache.num_slots_of(self.spec.window_lens.index(plan.window_len) if has_pools else 0)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """Store k and v, both [rows, num_kv_heads, head_dim], at `slots` [rows] of type `slot_dtype`."""
        self.kv_cache.write(layer, k, v, slots)

    @abstractmethod
    def prepare(self, plan: CascadePlan) -> PreparedAttention:
        """Derive what the kernels need from a plan; called once per step, before its first layer."""


class StepAttention:
    """Write a layer's K/V, then read."""

    def __init__(
        self,
        prepared: Sequence[PreparedAttention],
        backend: AttentionBackend,
        slots: Sequence[torch.Tensor],
        layer_kinds: Sequence[int] = (),
    ) -> None:
        """Join what a step's layers share.

        Args:
            prepared: one per attention kind
            backend: that prepared them
            slots: [rows] of the backend's `slot_dtype`, where the rows' K/V go: one for each attention kind, or one for
                all of them
            layer_kinds: [layers] index into `prepared`; empty: all layers the first
        """
        self._prepared, self._backend, self._kinds = prepared, backend, layer_kinds
        self._slots = slots if len(slots) == len(prepared) else [slots[0]] * len(prepared)

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Attention`."""
        kind = self._kinds[layer] if self._kinds else 0
        self._backend.write(layer, k, v, self._slots[kind])
        out, lse = self._prepared[kind].attend(layer, q)
        return out if sinks is None else apply_sinks(out, lse, sinks)


def column_tensor(column: IntColumn) -> torch.Tensor:
    """A column as an int32 CPU tensor [len(column)]: its own memory where it covers its array, so do not write."""
    owner = column.obj
    if len(column) == 0:  # torch.frombuffer refuses empty buffers
        return torch.empty(0, dtype=torch.int32)
    if isinstance(owner, array) and owner.typecode == "i" and len(owner) == len(column) and column.c_contiguous:
        return torch.frombuffer(owner, dtype=torch.int32)
    return torch.tensor(column.tolist(), dtype=torch.int32)
