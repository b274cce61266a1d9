"""Cascade attention in plain torch: every level by the same dense code, on any device, joined by log-sum-exp.

A plan without shared levels is plain attention by the same code. On the CPU the compiled kernels of `native_backend`
serve in its place where there is a compiler; this is their twin, and serves every dtype and device.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec, PreparedAttention
from cascade_llm.attention.dense import Workspace
from cascade_llm.attention.level_attention import LevelAttention
from cascade_llm.attention.merge_state import merge_state_in_place
from cascade_llm.attention.segment_batch import Blocking
from cascade_llm.errors import BackendError
from cascade_llm.kv_cache.paged_kv_cache import KVLayout, PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan

__all__ = ["TorchAttentionBackend"]

MAX_KEPT_BYTES = 1 << 30


class TorchAttentionBackend(AttentionBackend):
    """Attention in torch operators, for CPU and, where no better backend can be used, CUDA.

    A shared level that is the same object as in the plan before is prepared once, and from then on its K/V are
    gathered once. They are gathered in the layer's `attend`, because at `prepare` the step's own K/V are not yet
    written; they may be kept, because a shared page is full once it is read and is not written again while a level
    names it. They are kept by level object alone: equal page ids in another level may hold other tokens. What is kept
    is dropped as soon as a plan of that attention kind does not name the level.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        kv_cache: PagedKVCache,
        blocking: Blocking | None = None,
        max_kept_bytes: int = MAX_KEPT_BYTES,
    ) -> None:
        """`max_kept_bytes`: for gathered shared K/V, a second copy of them; beyond it they are gathered every step."""
        super().__init__(spec, kv_cache)
        layout = self.preferred_layout(spec.device)
        if kv_cache.layout != layout:
            raise BackendError(f"the torch backend reads {layout} pages, not {kv_cache.layout}: create the pool so")
        self.blocking = blocking or Blocking()
        self._max_kept_bytes = max_kept_bytes
        self._workspace = Workspace(spec.device)
        self._levels: dict[int | None, dict[CascadeLevel, LevelAttention]] = {}

    @staticmethod
    def preferred_layout(device: torch.device) -> KVLayout:
        """NHD on every device: a row is written in one piece, and heads are gathered as fast as from HND."""
        return "NHD"

    def prepare(self, plan: CascadePlan) -> PreparedAttention:
        """Batch the segments of a plan, taking over the shared levels of the plan before."""
        assert plan.page_size == self.kv_cache.page_size
        before = self._levels.get(plan.window_len, {})
        kept_bytes, levels = 0, dict[CascadeLevel, LevelAttention]()
        for level in plan.shared_levels:
            if level in before:  # a level that lasts is worth keeping
                levels[level] = before[level]
                kept_bytes += levels[level].keep_gathered(self._max_kept_bytes - kept_bytes)
            else:
                levels[level] = self._level(level, plan)
        self._levels[plan.window_len] = levels
        return _PreparedTorchAttention(self._level(plan.leaf, plan), levels.values())

    def _level(self, level: CascadeLevel, plan: CascadePlan) -> LevelAttention:
        leaf_of = plan if level is plan.leaf else None
        memory = self.kv_cache, self.num_slots(plan), self._workspace
        return LevelAttention(level, self.spec, *memory, self.blocking, leaf_of=leaf_of)


class _PreparedTorchAttention(PreparedAttention):
    def __init__(self, leaf: LevelAttention, shared: Iterable[LevelAttention]) -> None:
        self._leaf = leaf
        self._shared = [level for level in shared if not level.is_empty]

    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PreparedAttention`."""
        out, lse = self._leaf.attend(layer, q)
        if self.on_part is not None:
            self.on_part("suffix attention", 1.0)
        if not self._shared:
            return out, lse
        merged = out.float()
        for level in self._shared:
            merge_state_in_place(merged, lse, *level.attend(layer, q))
        if self.on_part is not None:
            self.on_part("shared attention", 1.0)
        return merged.to(q.dtype), lse
