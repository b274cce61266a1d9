"""Tells the double, step by step, which pages are published and which slots are the step's own.

A page is published when the prefix cache takes it: from then on other sequences read it. The step that is being planned
then may still fill it (a prompt's pages are published when they are planned); every later step may not.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

from cascade_llm import LLM
from cascade_llm.plan import StepPlan, StepResult
from tests.doubles.flashinfer import FlashInferDouble
from tests.doubles.planner import DoubleError

__all__ = ["watch_published_pages"]


def watch_published_pages(llm: LLM, double: FlashInferDouble) -> None:
    """Watch an engine's prefix cache, and let the double check every append of every step against it."""
    scheduler, runner = llm.engine.scheduler, llm.engine.executor.runner
    tables = scheduler._roster.tables
    cache = tables.cache
    published, new = set[int](), set[int]()
    schedule, submit, append = scheduler.schedule, runner.submit, cache.append

    def schedule_watched() -> StepPlan | None:
        published.update(new)
        new.clear()
        return schedule()

    def append_watched(tail: Any, token_ids: Any, keys: Any, pages: array[int]) -> Any:
        num_before = cache.num_pages
        tail = append(tail, token_ids, keys, pages)
        if cache.num_pages > num_before:  # else the tree had them, and the sequence keeps its own
            new.update(pages)
        return tail

    def forgetting(give_up: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def watched(argument: Any) -> Any:
            pages = give_up(argument)
            published.difference_update(pages)
            new.difference_update(pages)
            return pages

        return watched

    def submit_watched(plan: StepPlan) -> Callable[[], StepResult]:
        copied_to = published & {copy.target for copy in plan.page_copies if not copy.pool}
        if copied_to:
            raise DoubleError(f"copies to published pages {sorted(copied_to)}")
        pool = runner.kv_cache
        padding = range((pool.num_pages - 1) * pool.page_size, pool.num_slots)
        others = dict[int, tuple[set[int], set[int]]]()
        for kind, (slots, windows) in enumerate(zip(plan.window_slots, tables.window_pools, strict=True), 1):
            padding_of = range((pool.kind_pages[kind] - 1) * pool.page_size, pool.kind_pages[kind] * pool.page_size)
            expected = {windows.places[page] for page in published} - {-1}, {*slots, *padding_of}
            layers = [layer for layer, own in enumerate(plan.layer_kinds) if own == kind]
            others.update({pool.layer(layer).data_ptr(): expected for layer in layers})
        double.expect_appends(published, {*plan.slots, *padding}, others)
        return submit(plan)

    scheduler.schedule = schedule_watched  # type: ignore[method-assign]
    runner.submit = submit_watched  # type: ignore[method-assign]
    cache.append = append_watched  # type: ignore[method-assign]
    cache.evict, cache.drop = forgetting(cache.evict), forgetting(cache.drop)  # type: ignore[method-assign]
