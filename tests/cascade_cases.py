"""Random cascade plans, as `cascade-llm validate` generates them."""

from __future__ import annotations

from cascade_llm.plan import CascadePlan
from cascade_llm.validation.cases import CascadeCase, cascade_case, make_level, pool_with_only, single_level_plan

__all__ = ["CascadeCase", "cascade_case", "make_level", "pool_with_only", "single_level"]


def single_level(case: CascadeCase) -> CascadePlan:
    """The plain way to compute a case: every sequence reads all its pages by itself."""
    plan = single_level_plan(case.plan)
    plan.check(case.page_tables)
    return plan
