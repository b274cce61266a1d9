"""Rules of pools that attention kinds with windows have of their own.

The twin that says what is right has no cascade and plenty of pages. The run has so few places in the window's pool that
prompts which come again find some of their pages without one.
"""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from cascade_llm import LLM, SamplingParams
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.plan import PageCopy, StepPlan
from cascade_llm.scheduler.cascade.windows import WindowPlanner
from cascade_llm.scheduler.pages import PageTables
from cascade_llm.scheduler.window_pool import WindowPool
from cascade_llm.worker import cuda_graphs
from cascade_llm.worker.step_buffers import Padding
from tests.engine.tiny_llm import save_tiny, tiny_llm
from tests.gpu_path.gpu_engine import SHAPE, double_gpu, gpu_llm, graphs_of
from tests.mutations.harness import Scenario, mutations_of, scenario

LAYERS = ["sliding_attention", "full_attention"]
WINDOW_LEN = 12
PREFIX = [3 + (7 * i) % 80 for i in range(38)]
PROMPTS = [[*PREFIX, *(5 + (11 * i + j) % 80 for j in range(20 + i))] for i in range(5)] + [[60 - i for i in range(9)]]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6 + 3 * i, ignore_eos=True, n=1 + i % 2) for i in range(len(PROMPTS))
]
OPTIONS: dict[str, Any] = {
    "page_size": 4,
    "cascade_shared_prefix_len": 4,
    "max_num_seqs": 8,
    "max_model_len": 96,
    "max_num_batched_tokens": 32,
}
PAGE_BYTES = 2 * 2 * 64 * 4 * 4
"""Of a layer: K and V, two heads of 64 numbers in float32, four tokens."""
NUM_PAGES = 31 + 14
"""Of both pools."""

Tokens = list[list[list[int]]]


def generated(llm: LLM) -> Tokens:
    """Of each sample, in two rounds."""
    rounds = [llm.generate(PROMPTS, PARAMS) for _ in range(2)]
    return [[sample.token_ids for output in outputs for sample in output.outputs] for outputs in rounds]


def expected(folder: Path) -> Tokens:
    with tiny_llm(folder, enable_cascade_attention=False, **OPTIONS) as twin:
        return generated(twin)


def run(folder: Path) -> Tokens:
    with gpu_llm(folder, double_gpu(num_sm=16), kv_cache_bytes=NUM_PAGES * PAGE_BYTES, **OPTIONS) as llm:
        found = generated(llm)
        stats = llm.stats()
        assert graphs_of(llm).counters.graph_steps > 0
        assert stats["copied_pages"] > 0
        assert stats["window_12_total_pages"] < stats["total_pages"]
        return found


POOLS = scenario(
    Scenario(
        "pools of windows",
        partial(save_tiny, architecture="gemma3_text", **SHAPE, layer_types=LAYERS, sliding_window=WINDOW_LEN),
        expected,
        run,
    )
)
mutation = mutations_of(POOLS)


@mutation("the layers of a kind write at the places of its own pool")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StepPlan, "slots_of", lambda self, kind: self.slots)


@mutation("the plan of a kind names the places of its own pool")
def _(patch: pytest.MonkeyPatch) -> None:
    original = WindowPlanner.__init__

    def without_places(self: WindowPlanner, page_size: int, window_len: int, costs: Any, places: Any = None) -> None:
        original(self, page_size, window_len, costs, None)

    patch.setattr(WindowPlanner, "__init__", without_places)


@mutation("a page is copied in the layers of its pool")
def _(patch: pytest.MonkeyPatch) -> None:
    original = PagedKVCache.copy_pages

    def in_the_first(self: PagedKVCache, copies: Any, *others: Any) -> None:
        original(self, [copy._replace(pool=0) for copy in copies], *others)

    patch.setattr(PagedKVCache, "copy_pages", in_the_first)


@mutation("a page is copied in every pool")
def _(patch: pytest.MonkeyPatch) -> None:
    original = PageTables.reserve

    def in_the_first(self: PageTables, *arguments: Any) -> list[PageCopy] | None:
        copies = original(self, *arguments)
        return copies and [copy for copy in copies if not copy.pool]

    patch.setattr(PageTables, "reserve", in_the_first)


@mutation("a sequence holds the pages that its window reaches")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WindowPool, "first_held_page", lambda self, num_tokens: self.first_read_page(num_tokens) + 1)


@mutation("a prompt is found as far as the pages that windows reach have places")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PageTables, "_served", lambda self, match: match)


@mutation("a place that somebody holds is not given to another page")
def _(patch: pytest.MonkeyPatch) -> None:
    original = WindowPool._hold

    def none_held(self: WindowPool, places: Any) -> None:
        places = list(places)
        original(self, places)
        self._unheld.update(dict.fromkeys(places))

    patch.setattr(WindowPool, "_hold", none_held)


@mutation("a place is free when its page is")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(WindowPool, "forget", lambda self, pages: None)


@mutation("rows that nobody asked for have a page of their own in every pool")
def _(patch: pytest.MonkeyPatch) -> None:
    calls = count()
    patch.setattr(cuda_graphs, "Padding", lambda page, *rest: Padding(0 if next(calls) % 2 else page, *rest))
