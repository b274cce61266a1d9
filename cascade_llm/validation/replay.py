"""Recorded step plans, run again: attention on random K/V, on every backend that can run here.

The pool has the recorded size and dtype, one layer of it, because page addresses are part of what a recording is for;
of several pools that of the first kind serves for all kinds, and none has more pages.
Its K/V stay as they are while the steps go by, so what a backend keeps of a level that lasts is right or shows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

from cascade_llm.attention.backend import AttentionBackend, AttentionSpec
from cascade_llm.attention.reference import reference_attention
from cascade_llm.attention.select import BACKENDS, select_backend
from cascade_llm.device.devices import DTYPES, KV_DTYPES
from cascade_llm.errors import BackendError, CapacityError, PlanError
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import CascadePlan
from cascade_llm.plan_file import PlanFileHeader, PlanFileReader
from cascade_llm.validation.attention_error import TOLERANCES, AttentionError
from cascade_llm.validation.cases import single_level_plan
from cascade_llm.validation.report import Check, Progress
from cascade_llm.worker.memory import available_bytes

__all__ = ["replay_attention", "truncation_check"]

RANDOM_PERIOD = 1_000_003
"""Random numbers that are drawn once and repeated over the pool; a prime, so that no two tokens are alike."""


@dataclass(slots=True)
class _Replayed:
    """One backend, its pool, and how far its answers were off."""

    backend: AttentionBackend
    kv_cache: PagedKVCache
    against_reference: AttentionError = field(default_factory=AttentionError)
    single_against_reference: AttentionError = field(default_factory=AttentionError)
    against_single: AttentionError = field(default_factory=AttentionError)
    first_wrong_frame: int | None = None


def replay_attention(
    path: str | os.PathLike[str],
    *,
    device: torch.device,
    backend: str = "auto",
    max_steps: int | None = None,
    allow_truncated: bool = False,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> tuple[PlanFileHeader, list[Check]]:
    """Attention of every recorded step, by each backend: against float64, and against the step's single-level plan.

    Args:
        path: a file of `LLM(record_plans=...)`
        backend: "auto" for all that can run here, or the one to run
        max_steps: end after so many steps
        seed: of K, V and queries

    Raises:
        PlanError: the file is not whole; nothing after the wrong line has run
        CapacityError: the pool does not fit here
        BackendError: the backend that was asked for cannot run here
    """
    with PlanFileReader(path, allow_truncated=allow_truncated) as reader:
        header = reader.header
        spec = _spec(header, device)
        replayed, skipped = _open_backends(spec, header, backend, seed)
        generator = torch.Generator().manual_seed(-1 - seed)
        num_steps = 0
        for step in islice(reader, max_steps):
            progress(f"{reader.path.name}, frame {step.frame}", num_steps, 0)
            for cascade in step.plan.cascades:
                _replay_plan(cascade, replayed, spec, generator, step.frame)
            num_steps += 1
        if not num_steps:
            raise PlanError(f"{reader.path} has no steps: record a run that generates something")
        checks = [check for name, each in replayed.items() for check in _checks(name, each, spec.dtype, num_steps)]
        return header, [*checks, *skipped, *truncation_check(reader)]


def truncation_check(reader: PlanFileReader) -> list[Check]:
    """A line in the report where the file broke off and that was allowed."""
    if reader.truncated_at is None:
        return []
    note = f"{reader.path} breaks off at frame {reader.truncated_at}: only the steps before it were replayed"
    return [Check(name="truncated file", passed=None, note=note)]


def _open_backends(
    spec: AttentionSpec, header: PlanFileHeader, backend: str, seed: int
) -> tuple[dict[str, _Replayed], list[Check]]:
    replayed, skipped = dict[str, _Replayed](), list[Check]()
    for name in BACKENDS if backend == "auto" else [backend]:
        try:
            choice = select_backend(name, spec)
        except BackendError as error:
            if backend != "auto":
                raise
            skipped.append(Check(name=name, passed=None, note=str(error)))
            continue
        kv_cache = _random_pool(header, spec, choice.backend, seed)
        replayed[name] = _Replayed(choice.backend(spec, kv_cache), kv_cache)
    return replayed, skipped


def _random_pool(
    header: PlanFileHeader, spec: AttentionSpec, backend: type[AttentionBackend], seed: int
) -> PagedKVCache:
    """One layer of the recorded pool, every slot filled: the same numbers whatever the layout."""
    num_pages = header.pool_pages[0]
    num_slots = num_pages * header.page_size
    num_bytes = 2 * num_slots * spec.num_kv_heads * spec.head_dim * (spec.dtype.itemsize + spec.kv_number_bytes)
    free_bytes = available_bytes(spec.device)
    if num_bytes > free_bytes:
        raise CapacityError(
            f"one layer of the recorded pool takes {num_bytes:,.0f} bytes with the numbers that fill it, and "
            f"{free_bytes:,} are free: replay it on a machine with more memory"
        )
    kv_cache = PagedKVCache(
        num_layers=1,
        num_pages=num_pages,
        page_size=header.page_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=spec.page_dtype,
        device=spec.device,
        layout=backend.preferred_layout(spec.device),
    )
    numbers = torch.randn(RANDOM_PERIOD, generator=torch.Generator().manual_seed(seed))
    shape = (num_slots, spec.num_kv_heads, spec.head_dim)
    repeats = -(-2 * num_slots * spec.num_kv_heads * spec.head_dim // RANDOM_PERIOD)
    k, v = numbers.to(spec.device, spec.dtype).repeat(repeats)[: 2 * num_slots * shape[1] * shape[2]].view(2, *shape)
    kv_cache.write(0, k, v, torch.arange(num_slots, device=spec.device))
    return kv_cache


def _replay_plan(
    plan: CascadePlan, replayed: dict[str, _Replayed], spec: AttentionSpec, generator: torch.Generator, frame: int
) -> None:
    q = torch.randn(plan.num_rows, spec.num_qo_heads, spec.head_dim, generator=generator)
    q = q.to(spec.device, spec.dtype)
    single = single_level_plan(plan)
    expected: tuple[torch.Tensor, torch.Tensor] | None = None
    for each in replayed.values():
        if expected is None:  # all pools hold the same
            expected = reference_attention(plan, each.kv_cache, 0, q, spec.sm_scale, soft_cap=spec.logits_soft_cap)
        found = each.backend.prepare(plan).attend(0, q)
        found = found[0].clone(), found[1].clone()  # the next plan may be computed in the same memory
        plain = each.backend.prepare(single).attend(0, q) if plan.shared_levels else found
        each.against_reference.add(found, expected)
        each.single_against_reference.add(plain, expected)
        each.against_single.add(found, plain)
        if each.first_wrong_frame is None and not each.against_reference.within(TOLERANCES[spec.dtype]):
            each.first_wrong_frame = frame


def _checks(name: str, replayed: _Replayed, dtype: torch.dtype, num_steps: int) -> Sequence[Check]:
    tolerance = TOLERANCES[dtype]
    comparisons = (
        ("recorded plans against float64", replayed.against_reference, tolerance),
        ("their single-level plans against float64", replayed.single_against_reference, tolerance),
        ("recorded plans against single-level ones", replayed.against_single, 2 * tolerance),
    )
    wrong = f"first wrong at frame {replayed.first_wrong_frame}" if replayed.first_wrong_frame else ""
    return [
        Check(
            name=f"{name}: {what}",
            passed=error.within(allowed),
            found=f"{error} ({num_steps} steps, {error.num_rows:,} rows)",
            allowed=f"{allowed:.0e}",
            note=wrong if error is replayed.against_reference else "",
            figures={"out": error.out, "lse": error.lse, "steps": num_steps, "tolerance": allowed},
        )
        for what, error, allowed in comparisons
    ]


def _spec(header: PlanFileHeader, device: torch.device) -> AttentionSpec:
    dtype = DTYPES[header.dtype]
    return AttentionSpec(
        num_layers=1,
        num_qo_heads=header.num_qo_heads,
        num_kv_heads=header.num_kv_heads,
        head_dim=header.head_dim,
        sm_scale=header.sm_scale,
        dtype=dtype,
        device=device,
        kv_dtype=KV_DTYPES.get(header.kv_cache_dtype, dtype),
        logits_soft_cap=header.attention_soft_cap,
    )
