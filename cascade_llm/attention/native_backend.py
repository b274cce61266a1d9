"""Cascade attention on the CPU by compiled kernels: one call per layer, pages read in place, all levels in one softmax.

How it works is told at the top of `native_attention.c`; the twin in plain torch is `torch_backend`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec, PreparedAttention, column_tensor
from cascade_llm.attention.dense import Workspace
from cascade_llm.attention.native_kernels import (
    TASK_FIELDS,
    LayerPages,
    LevelColumns,
    PlanColumns,
    SharedOut,
    kernels_for,
    reasons_against_native,
)
from cascade_llm.errors import BackendError
from cascade_llm.kv_cache.paged_kv_cache import KVLayout, PagedKVCache
from cascade_llm.plan import CascadePlan

__all__ = ["NativeAttentionBackend", "Sharing"]

LOG2_E = math.log2(math.e)
SPARE_TASKS_PER_THREAD = 32


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """How a step's work is shared out."""

    num_threads: int | None = None
    """None: as many as torch uses at `prepare`."""
    smallest_task: int = 8192
    """Queries times keys below which a task is not worth starting; some microseconds' work."""


class NativeAttentionBackend(AttentionBackend):
    """Attention by compiled C on the CPU, in float32 or bfloat16, over NHD pages of any dtype.

    Nothing is kept from step to step: the kernels read the plan's columns and the pool's pages where they lie.
    """

    def __init__(self, spec: AttentionSpec, kv_cache: PagedKVCache, sharing: Sharing | None = None) -> None:
        """Raises `BackendError` with the reasons where the kernels cannot serve."""
        super().__init__(spec, kv_cache)
        reasons = reasons_against_native(spec)
        if kv_cache.layout != "NHD":
            reasons.append(f"reads NHD pages, not {kv_cache.layout}: create the pool so")
        if kv_cache.dtype != spec.page_dtype:
            reasons.append(f"was asked to read pages of {spec.page_dtype}, not {kv_cache.dtype}: create the pool so")
        if reasons:
            raise BackendError(f"the native backend {'; '.join(reasons)}")
        self._kernels = kernels_for(spec.dtype, spec.page_dtype, spec.head_dim)
        self.sharing = sharing or Sharing()
        self._workspace = Workspace(spec.device)
        self._layers = [LayerPages.of(kv_cache, layer) for layer in range(kv_cache.num_layers)]
        self._pages = [ctypes.addressof(layer) for layer in self._layers]

    can_be_recorded = True

    @staticmethod
    def preferred_layout(device: torch.device) -> KVLayout:
        """NHD: a row is written in one piece, and the KV heads of a token lie side by side."""
        return "NHD"

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        """See `AttentionBackend`; k and v may be views into the rows of a wider tensor."""
        k, v = self._rows(k), self._rows(v)
        self._kernels["write_slots"](
            self._pages[layer],
            k.data_ptr(),
            v.data_ptr(),
            k.stride(0),
            v.stride(0),
            slots.data_ptr(),
            slots.shape[0],
            self.spec.num_kv_heads,
        )

    def prepare(self, plan: CascadePlan) -> PreparedAttention:
        """Share out the work of a plan over torch's threads."""
        assert plan.page_size == self.kv_cache.page_size
        return _PreparedNativeAttention(self, plan)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        """x [rows, heads, head_dim] as the kernels read it: rows may be apart, what is in them not."""
        assert x.dtype == self.spec.dtype
        return x if x.stride()[1:] == (self.spec.head_dim, 1) else x.contiguous()


class _PreparedNativeAttention(PreparedAttention):
    def __init__(self, backend: NativeAttentionBackend, plan: CascadePlan) -> None:
        self._backend = backend
        self._columns = [
            [column_tensor(c) for c in (x.qo_indptr, x.kv_page_indptr, x.kv_page_indices, x.kv_last_page_len)]
            for x in plan.levels
        ]
        self._levels = (LevelColumns * len(plan.levels))(
            *(LevelColumns(*(c.data_ptr() for c in columns), len(columns[0]) - 1) for columns in self._columns)
        )
        spec = backend.spec
        self._plan = PlanColumns(
            ctypes.addressof(self._levels),
            len(plan.levels),
            plan.page_size,
            plan.window_len or 0,
            spec.num_qo_heads,
            spec.num_kv_heads,
            spec.sm_scale * LOG2_E,
            (spec.logits_soft_cap or 0.0) * LOG2_E,
        )
        self._level_ns = torch.zeros(len(plan.levels), dtype=torch.int64)
        """Threads' time on each level; counted where `on_part` is set."""
        self._share_out(plan.num_rows)

    def _share_out(self, num_rows: int) -> None:
        """Cut the work into tasks, and take memory for the states of blocks that are cut in parts."""
        backend, plan_address = self._backend, ctypes.addressof(self._plan)
        num_threads = backend.sharing.num_threads or torch.get_num_threads()
        capacity = num_rows + SPARE_TASKS_PER_THREAD * num_threads
        self._tasks = torch.empty(capacity, TASK_FIELDS, dtype=torch.int64)
        partial_size = ctypes.c_int64()
        num_tasks = backend._kernels["plan_tasks"](
            plan_address,
            num_threads,
            backend.sharing.smallest_task,
            self._tasks.data_ptr(),
            capacity,
            ctypes.addressof(partial_size),
        )
        self._partials = backend._workspace.take("partials", (partial_size.value,), torch.float32)
        tasks, partials = self._tasks.data_ptr(), self._partials.data_ptr()
        self._shared_out = SharedOut(plan_address, tasks, num_tasks, num_threads, partials)
        self._address = ctypes.addressof(self._shared_out)
        self._replacement: PreparedAttention | None = None

    def take_over(self, other: PreparedAttention) -> None:
        """See `PreparedAttention`."""
        assert isinstance(other, _PreparedNativeAttention)
        self._replacement = other  # whose memory the kernels read from now on
        ctypes.memmove(self._address, other._address, ctypes.sizeof(SharedOut))

    def attend(self, layer: int, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `PreparedAttention`."""
        backend = self._backend
        q = backend._rows(q)
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:2], dtype=torch.float32)
        backend._kernels["attend"](
            self._address,
            backend._pages[layer],
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            lse.data_ptr(),
            None if self.on_part is None else self._level_ns.data_ptr(),
        )
        if self.on_part is not None:
            self._tell_parts(self.on_part)
        return out, lse

    def _tell_parts(self, on_part: Callable[[str, float], None]) -> None:
        """By the threads' time on each level: the levels of a block are computed in one go."""
        *shared_ns, leaf_ns = self._level_ns.tolist()
        self._level_ns.zero_()
        if not shared_ns:
            on_part("suffix attention", 1.0)
            return
        on_part("suffix attention", leaf_ns / max(1, sum(shared_ns) + leaf_ns))
        on_part("shared attention", 1.0)
