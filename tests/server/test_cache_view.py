"""What the live view tells of the prefix cache, against the whole tree."""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest

from cascade_llm.scheduler.page_keys import PageKeys, root_key
from cascade_llm.scheduler.prefix_cache import PrefixCache, RadixNode
from cascade_llm.server.cache_view import MOST_RUNS, cached_runs

PAGE_SIZE = 2


def grown(seed: int, num_sequences: int) -> PrefixCache:
    """A cache of sequences with few different tokens, half of which have gone; two tenants."""
    draw, cache, pages = random.Random(seed), PrefixCache(PAGE_SIZE), 0
    for number in range(num_sequences):
        tokens = array("i", [draw.randrange(2) for _ in range(2 * draw.randrange(1, 9))])
        owner = draw.choice("ab")
        keys = PageKeys(root_key(owner.encode()), tokens, PAGE_SIZE, owner)
        tail = cache.hold(cache.match(tokens, keys, len(tokens) // PAGE_SIZE), keys)
        num_new = len(tokens) // PAGE_SIZE - tail.end
        tail = cache.append(tail, tokens, keys, array("i", range(pages, pages + num_new)))
        pages += num_new
        if number % 2:
            cache.release(tail)
    cache.check()
    return cache


def whole(node: RadixNode, owner: str | None) -> dict[str, Any]:
    """All runs behind a node, as `cached_runs` would tell them without a limit."""
    behind = [child for child in node.children.values() if owner in (None, child.owner)]
    behind.sort(key=lambda child: (child.num_holds, len(child.children), len(child.token_ids)), reverse=True)
    runs = [
        {
            "num_tokens": len(child.token_ids),
            "num_holders": child.num_holds,
            "has_pages": True,
            "token_ids": child.token_ids.tolist(),
            **whole(child, owner),
        }
        for child in behind
    ]
    return {"runs": runs, "num_more": 0}


def shown(told: dict[str, Any]) -> int:
    return sum(1 + shown(run) for run in told["runs"])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("owner", [None, "a", "b"])
def test_a_small_cache_is_told_whole(seed: int, owner: str | None) -> None:
    root = grown(seed, 12).root
    wanted = whole(root, owner)
    assert 0 < shown(wanted) <= MOST_RUNS
    assert cached_runs(root, owner, with_tokens=True) == wanted


@pytest.mark.parametrize("seed", range(6))
def test_of_a_large_cache_what_is_held_most_comes_first_and_the_rest_is_counted(seed: int) -> None:
    cache = grown(seed, 300)
    told = cached_runs(cache.root, None, with_tokens=False)
    assert shown(told) == MOST_RUNS < sum(1 for _ in cache.nodes())

    def check(node: RadixNode, part: dict[str, Any]) -> None:
        assert len(part["runs"]) + part["num_more"] == len(node.children)
        holders = [run["num_holders"] for run in part["runs"]]
        assert holders == sorted((child.num_holds for child in node.children.values()), reverse=True)[: len(holders)]

    check(cache.root, told)
    assert "token_ids" not in told["runs"][0]
