"""Times of attention alone, per layer, for plans over one tree of K/V."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec
from cascade_llm.bench.attention_cases import PAGE_SIZE, AttentionCase
from cascade_llm.errors import ConfigError
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import CascadePlan
from cascade_llm.worker.memory import available_bytes

__all__ = ["PlanTime", "check_memory", "time_plans"]

Name = TypeVar("Name")

POOL_BYTES = 256 << 20
"""K/V of so many layers are read in turn that they do not stay in a processor's caches from one step to the next."""
STEP_S = 0.1
"""No more layers are attended in a step than take about so long."""


class PlanTime(NamedTuple):
    """One step of a plan."""

    prepare_s: float
    """Once for all layers."""
    attend_s: float
    """Per layer."""
    num_layers: int
    """Of the model."""

    @property
    def layer_s(self) -> float:
        """Seconds per layer, its part of the preparation included."""
        return self.prepare_s / self.num_layers + self.attend_s


def time_plans(
    case: AttentionCase,
    plans: Mapping[Name, CascadePlan],
    spec: AttentionSpec,
    backend: type[AttentionBackend],
    *,
    measure_s: float,
) -> dict[Name, PlanTime]:
    """The shortest of several readings of each plan: what else the machine does only adds to it.

    A reading is a step: the plan is prepared, once for all layers of a model of `spec.num_layers`, and attended in some
    of them. The plans take turns.

    Args:
        measure_s: about how long to measure all of them together

    Raises:
        ConfigError: the case's K/V exceed the memory
    """
    check_memory(case, spec)
    last_page = max(max(level.kv_page_indices, default=0) for plan in plans.values() for level in plan.levels)
    with torch.inference_mode():
        kv_cache = _filled_pool(max(case.num_pages, last_page + 1), spec, backend)
        q = torch.randn(case.num_sequences, spec.num_qo_heads, spec.head_dim, dtype=spec.dtype, device=spec.device)
        steppers = {name: _Stepper(backend(spec, kv_cache), plan, q) for name, plan in plans.items()}
        best: dict[Name, PlanTime] = {}
        end, num_rounds = time.perf_counter() + measure_s, 0
        while time.perf_counter() < end or num_rounds < 2:
            for name, stepper in steppers.items():
                step = stepper.step()
                best[name] = min(step, best.get(name, step), key=lambda taken: taken.layer_s)
            num_rounds += 1
        return best


class _Stepper:
    """Steps of one plan, by a backend of its own: what it keeps from step to step is not mixed with other plans'."""

    def __init__(self, attention: AttentionBackend, plan: CascadePlan, q: torch.Tensor) -> None:
        self._attention, self._plan, self._q = attention, plan, q
        self._num_layers = 1
        self._num_layers = max(2, min(attention.kv_cache.num_layers, int(STEP_S / self.step().layer_s)))
        for _ in range(2):  # shared levels that last are kept from the second step on
            self.step()

    def step(self) -> PlanTime:
        """One step."""
        spec, kv_cache = self._attention.spec, self._attention.kv_cache
        start = _now(spec.device)
        prepared = self._attention.prepare(self._plan)
        ready = _now(spec.device)
        for layer in range(self._num_layers):
            prepared.attend(layer % kv_cache.num_layers, self._q)
        return PlanTime(ready - start, (_now(spec.device) - ready) / self._num_layers, spec.num_layers)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def check_memory(case: AttentionCase, spec: AttentionSpec) -> None:
    """Raise `ConfigError` where the K/V of one layer take more than half of the free memory."""
    layer_bytes = case.num_pages * _page_bytes(spec)
    if 2 * layer_bytes > available_bytes(spec.device):
        raise ConfigError(
            f"the tree {case} has {layer_bytes:,} bytes of K/V in a layer, too many for the free memory: leave it out, "
            "or choose fewer heads"
        )


def _page_bytes(spec: AttentionSpec) -> int:
    return PAGE_SIZE * 2 * spec.num_kv_heads * spec.head_dim * spec.dtype.itemsize


def _filled_pool(num_pages: int, spec: AttentionSpec, backend: type[AttentionBackend]) -> PagedKVCache:
    """A pool with values in all of its pages: what was never written is not in memory."""
    kv_cache = PagedKVCache(
        num_layers=max(1, min(spec.num_layers, POOL_BYTES // (num_pages * _page_bytes(spec)))),
        num_pages=num_pages,
        page_size=PAGE_SIZE,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.dtype,
        device=spec.device,
        layout=backend.preferred_layout(spec.device),
    )
    some = torch.randn(1 << 16, device=spec.device).to(spec.dtype)
    for layer in range(kv_cache.num_layers):
        values = kv_cache.layer(layer).view(-1)
        for start in range(0, len(values), len(some)):
            part = values[start : start + len(some)]
            part.copy_(some[: len(part)])
    return kv_cache
