"""The cache that the benchmark measures is the one that its load describes."""

from __future__ import annotations

import pytest

from benchmarks.cache_tree import CacheTreeLoad, measure_cache_tree
from cascade_llm.errors import ConfigError


def test_a_small_tree() -> None:
    load = CacheTreeLoad(num_pages=5000, num_prefixes=250, page_size=4)
    seen: list[int] = []
    report = measure_cache_tree(load, seen.append)
    # three headers, and behind them a run for each prompt
    assert report.num_pages == load.own_pages * 253
    assert report.num_pages <= 5000 < report.num_pages + 253
    assert report.num_nodes == 253
    assert min(report.build_s, report.hit_s, report.miss_s, report.evict_s) > 0
    assert report.as_dict()["load"]["num_prefixes"] == 250
    assert seen == [0]


def test_prompts_share_headers() -> None:
    prompts = list(CacheTreeLoad(num_pages=3000, num_prefixes=150, page_size=2).prompts())
    header_len = 2 * CacheTreeLoad(num_pages=3000, num_prefixes=150, page_size=2).own_pages
    assert len({tuple(prompt[:header_len]) for prompt in prompts}) == 2
    assert len({tuple(prompt) for prompt in prompts}) == 150


@pytest.mark.parametrize("change", [{"num_prefixes": 0}, {"page_size": 0}, {"num_pages": 10}])
def test_loads_out_of_range(change: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        CacheTreeLoad(**{"num_pages": 1000, "num_prefixes": 100, **change})
