"""What a large prefix cache costs: memory, and the time to build it, look into it and evict from it."""

from __future__ import annotations

import gc
import random
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from cascade_llm.errors import ConfigError
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.page_keys import root_key
from cascade_llm.scheduler.pages import PageTables
from cascade_llm.scheduler.sequence import Request, Sequence

__all__ = ["CacheTreeLoad", "CacheTreeReport", "measure_cache_tree"]

PREFIXES_PER_HEADER = 100
NUM_QUERIES = 1000


@dataclass(frozen=True, kw_only=True)
class CacheTreeLoad:
    """Prompts that have ended, all of them still cached. A hundred at a time begin with a common header."""

    num_pages: int = 10_000_000
    """Of the tree, about."""
    num_prefixes: int = 100_000
    page_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_prefixes < 1 or self.page_size < 1:
            raise ConfigError("num_prefixes and page_size must be 1 or larger")
        if self.num_pages < 2 * self.num_prefixes:
            raise ConfigError(f"{self.num_pages} pages are too few for {self.num_prefixes} prefixes: give 2 for each")

    @property
    def own_pages(self) -> int:
        """Pages of a prefix behind its header; the header has as many."""
        num_headers = -(-self.num_prefixes // PREFIXES_PER_HEADER)
        return self.num_pages // (self.num_prefixes + num_headers)

    def prompts(self) -> Iterator[array[int]]:
        """Token ids, one prompt after the other; the last token is behind the last full page."""
        draw = random.Random(self.seed)
        header = array("i")
        for index in range(self.num_prefixes):
            if index % PREFIXES_PER_HEADER == 0:
                header = self._tokens(draw, self.own_pages * self.page_size)
            yield header + self._tokens(draw, self.own_pages * self.page_size + 1)

    @staticmethod
    def _tokens(draw: random.Random, count: int) -> array[int]:
        return array("i", array("H", draw.randbytes(2 * count)))


@dataclass(frozen=True, kw_only=True)
class CacheTreeReport:
    """CPU seconds and bytes of resident memory."""

    load: CacheTreeLoad
    num_pages: int
    """In the tree."""
    num_nodes: int
    memory_bytes: int
    """Of the tree and of the free list and owner counts of all its pages."""
    build_s: float
    hit_s: float
    """To match a whole cached prompt, its keys included, hold it and release it."""
    miss_s: float
    """To find that nothing of a prompt is there."""
    evict_s: float
    """Each page."""

    @property
    def bytes_per_page(self) -> float:
        """Memory over pages; a page's token ids alone are `4 * page_size` bytes as int32."""
        return self.memory_bytes / self.num_pages

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "bytes_per_page": self.bytes_per_page}


def measure_cache_tree(load: CacheTreeLoad, on_prefix: Callable[[int], None] = lambda done: None) -> CacheTreeReport:
    """Build the tree as the scheduler does, prompt by prompt, and use it.

    Args:
        on_prefix: called now and then with the number of prefixes that are in the tree
    """
    before = _resident_bytes()
    tables = PageTables(load.num_pages, load.page_size, keep_unheld=True)
    clock = _Clock()
    some: list[array[int]] = []
    keep = {random.Random(index).randrange(load.num_prefixes) for index in range(NUM_QUERIES)}
    for index, prompt in enumerate(load.prompts()):
        with clock.part("build"):
            _serve(tables, prompt)
        if index in keep:
            some.append(prompt)
        if index % 1000 == 0:
            on_prefix(index)
    queries = sum(len(prompt) * prompt.itemsize for prompt in some)
    memory_bytes = _resident_bytes() - before - queries
    num_pages, num_nodes = tables.cache.num_pages, sum(1 for _ in tables.cache.nodes())
    for prompt in some:
        with clock.part("hit"):
            _serve(tables, prompt)
        unknown = array("i", reversed(prompt))
        with clock.part("miss"):
            tables.match(_sequence(unknown, load.page_size))
    num_evicted = min(num_pages, 100 * NUM_QUERIES)
    with clock.part("evict"):
        tables.evict(num_evicted)
    return CacheTreeReport(
        load=load,
        num_pages=num_pages,
        num_nodes=num_nodes,
        memory_bytes=memory_bytes,
        build_s=clock.seconds["build"],
        hit_s=clock.seconds["hit"] / len(some),
        miss_s=clock.seconds["miss"] / len(some),
        evict_s=clock.seconds["evict"] / num_evicted,
    )


def _serve(tables: PageTables, prompt: array[int]) -> None:
    """A request that ends at once: its prompt is matched, given pages, published and released."""
    sequence = _sequence(prompt, tables.page_size)
    tables.admit(sequence, tables.match(sequence))
    assert sequence.tail is not None
    sequence.planned_len = sequence.tail.end * tables.page_size
    reserved = tables.reserve(sequence, len(prompt) - 1)
    assert reserved is not None
    tables.publish_planned(sequence, len(prompt) - 1)
    tables.release(sequence)


def _sequence(prompt: array[int], page_size: int) -> Sequence:
    request = Request(request_id="", prompt_token_ids=prompt, params=SamplingParams(), seed=0)
    return Sequence(request, 0, 0, page_size, root_key())


class _Clock:
    """CPU time by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def _resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)
