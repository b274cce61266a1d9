"""Every backend that can run here against dense float64 attention, over generated plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from cascade_llm.attention.backend import AttentionSpec
from cascade_llm.attention.reference import reference_attention
from cascade_llm.attention.select import BACKENDS, BackendChoice, select_backend
from cascade_llm.config import ModelConfig
from cascade_llm.errors import BackendError
from cascade_llm.kv_cache.paged_kv_cache import KVScale
from cascade_llm.validation.attention_error import TOLERANCES, AttentionError
from cascade_llm.validation.cases import (
    CascadeCase,
    CaseChoices,
    cascade_case,
    pool_with_only,
    single_level_plan,
)
from cascade_llm.validation.report import Check, Progress

__all__ = ["FAMILIES", "check_attention"]

FAMILIES: Mapping[str, Sequence[CaseChoices]] = {
    "mixed steps": [CaseChoices(window=False)],
    "page sizes 1 to 64": [CaseChoices(page_size=size, window=False) for size in (1, 2, 3, 4, 8, 16, 32, 64)],
    "empty segments": [CaseChoices(num_sequences=8, num_shared_levels=2, window=False)],
    "one row": [CaseChoices(num_sequences=1, decode=True, window=False)],
    "all rows identical": [
        CaseChoices(num_sequences=9, num_shared_levels=levels, decode=True, identical=True, window=False)
        for levels in (0, 2)
    ],
    "4 levels": [CaseChoices(num_sequences=12, num_shared_levels=3, window=False)],
}
"""What is generated, by the name in the report; a family takes its choices in turn."""

OTHER_HEADS = ((1, 1, 64), (2, 4, 64), (1, 8, 128), (8, 1, 128))
"""KV heads, query heads per KV head, head_dim: beside the model's own, which gets every second case."""


class Numbers(NamedTuple):
    """What is computed in, and what K and V are stored in."""

    dtype: torch.dtype
    kv_dtype: torch.dtype

    def __str__(self) -> str:
        pages = "" if self.kv_dtype == self.dtype else f", {_name(self.kv_dtype)} pages"
        return f"{_name(self.dtype)}{pages}"


NUMBERS = tuple(Numbers(dtype, dtype) for dtype in (torch.float32, torch.bfloat16))
SCALE_OF_8_BITS = KVScale(0.5, 0.75)
"""Of pages of 8 bits: not 1, so that leaving one out shows."""


def check_attention(
    model: ModelConfig,
    device: torch.device,
    *,
    cases_per_family: int,
    seed: int,
    progress: Progress,
    kv_dtype: torch.dtype | None = None,
) -> list[Check]:
    """One check per backend, dtype and family of plans; each plan as it is, and as its single-level twin.

    kv_dtype: to check pages of that dtype as well, under another dtype of the computation
    """
    computed = torch.float32 if kv_dtype == torch.bfloat16 else torch.bfloat16
    numbers = NUMBERS if kv_dtype is None else (*NUMBERS, Numbers(computed, kv_dtype))
    total, done, checks = len(BACKENDS) * len(numbers) * len(FAMILIES), 0, dict[tuple[str, Numbers], list[Check]]()
    for backend in BACKENDS:
        for kind in numbers:
            checks[backend, kind] = []
            for family in FAMILIES:
                progress(f"{backend}, {kind}: {family}", done, total)
                heads = (model.num_kv_heads, model.num_qo_heads // model.num_kv_heads, model.head_dim)
                cases = _cases(family, heads, cases_per_family, seed)
                found = _check_family(backend, kind, device, family, cases, seed, model.attention_soft_cap)
                checks[backend, kind].append(found)
                done += 1
    return _joined_skips(checks)


def _check_family(
    backend: str,
    kind: Numbers,
    device: torch.device,
    family: str,
    cases: Sequence[CascadeCase],
    seed: int,
    soft_cap: float | None,
) -> Check:
    error, tolerance = AttentionError(), TOLERANCES[kind.dtype]
    name, reasons, worst_case = f"{backend}, {kind}: {family}", dict[str, None](), ""
    for number, case in enumerate(cases):
        spec = _spec(case, kind, device, soft_cap)
        try:
            choice = select_backend(backend, spec)
        except BackendError as refusal:
            reasons[str(refusal)] = None
            continue
        before = max(error.out, error.lse)
        _add_case(error, case, choice, spec, seed + number)
        if max(error.out, error.lse) > max(before, tolerance):
            worst_case = str(case)
    if not error.num_plans:
        return Check(name=name, passed=None, note="; ".join(reasons))
    notes = [f"worst: {worst_case}"] if worst_case else [f"not for every shape: {reason}" for reason in reasons]
    return Check(
        name=name,
        passed=error.within(tolerance),
        found=f"{error} ({error.num_plans} plans)",
        allowed=f"{tolerance:.0e}",
        note="; ".join(notes),
        figures={"out": error.out, "lse": error.lse, "plans": error.num_plans, "tolerance": tolerance},
    )


def _add_case(error: AttentionError, case: CascadeCase, choice: BackendChoice, spec: AttentionSpec, seed: int) -> None:
    layout = choice.backend.preferred_layout(spec.device)
    scale = SCALE_OF_8_BITS if spec.page_dtype == torch.float8_e4m3fn else KVScale()
    kv_cache = pool_with_only(
        case, num_layers=1, dtype=spec.page_dtype, seed=seed, layout=layout, device=spec.device, scales=[scale]
    )
    generator = torch.Generator().manual_seed(-1 - seed)  # not the one that drew K and V
    num_rows = 1 if case.identical else case.plan.num_rows
    q = torch.randn(num_rows, case.num_qo_heads, case.head_dim, generator=generator)
    q = q.expand(case.plan.num_rows, -1, -1).to(spec.device, spec.dtype).contiguous()
    expected = reference_attention(case.plan, kv_cache, 0, q, spec.sm_scale, soft_cap=spec.logits_soft_cap)
    backend = choice.backend(spec, kv_cache)
    for plan in (case.plan, single_level_plan(case.plan)):
        error.add(backend.prepare(plan).attend(0, q), expected)


def _cases(family: str, own_heads: tuple[int, int, int], count: int, seed: int) -> list[CascadeCase]:
    choices, cases = FAMILIES[family], []
    for number in range(count):
        heads = own_heads if number % 2 == 0 else OTHER_HEADS[number // 2 % len(OTHER_HEADS)]
        cases.append(cascade_case(seed + number, replace(choices[number % len(choices)], heads=heads)))
    return cases


def _spec(case: CascadeCase, kind: Numbers, device: torch.device, soft_cap: float | None) -> AttentionSpec:
    return AttentionSpec(
        num_layers=1,
        num_qo_heads=case.num_qo_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        sm_scale=case.head_dim**-0.5,
        dtype=kind.dtype,
        device=device,
        kv_dtype=kind.kv_dtype,
        logits_soft_cap=soft_cap,
    )


def _joined_skips(checks: Mapping[tuple[str, Numbers], list[Check]]) -> list[Check]:
    """What a backend can run in no family, or not at all, is one line."""
    joined: list[Check] = []
    for backend in BACKENDS:
        own = {kind: found for (name, kind), found in checks.items() if name == backend}
        if all(check.passed is None for found in own.values() for check in found):
            joined.append(Check(name=backend, passed=None, note=list(own.values())[-1][-1].note))
            continue
        for kind, found in own.items():
            skipped = all(check.passed is None for check in found)
            joined += [Check(name=f"{backend}, {kind}", passed=None, note=found[-1].note)] if skipped else found
    return joined


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
