"""The tree of shared runs, compared with grouping the sequences page by page."""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence as Rows

from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.tree import PlannedRows, Run, attach_nodes, shared_forest
from cascade_llm.scheduler.page_keys import PageKeys, root_key
from cascade_llm.scheduler.prefix_cache import PrefixCache, RadixNode
from cascade_llm.scheduler.sequence import Request, Sequence
from tests.scheduler.forests import all_runs

SIZE = 2

PageRun = tuple[int, int, frozenset[int]]
"""First page, last page, the sequences that share it."""


def add_path(cache: PrefixCache, pages: Rows[int], next_page: int = 0) -> RadixNode:
    """A sequence whose text has a page for each of these numbers."""
    tokens = array("i", [page for page in pages for _ in range(SIZE)])
    keys = PageKeys(root_key(), tokens, SIZE)
    tail = cache.hold(cache.match(tokens, keys, len(pages)), keys)
    return cache.append(tail, tokens, keys, array("i", range(next_page, next_page + len(pages) - tail.end)))


def rows_of(tail: RadixNode, start_len: int) -> PlannedRows:
    request = Request(request_id="a", prompt_token_ids=[1], params=SamplingParams(), seed=0)
    sequence = Sequence(request, 0, 0, SIZE, root_key())
    sequence.tail = tail
    return PlannedRows(sequence, start_len, 1)


def pages_of(cache: PrefixCache, tail: RadixNode) -> list[int]:
    return [page for node in reversed(list(cache.path_up(tail))) for page in node.pages]


def shared_runs(paths: Rows[Rows[int]]) -> set[PageRun]:
    """Maximal runs of pages that the same two or more sequences share."""
    runs: list[tuple[int, int, frozenset[int]]] = []
    for depth in range(max(map(len, paths), default=0)):
        page_sharers: dict[int, set[int]] = {}
        for index, path in enumerate(paths):
            if depth < len(path):
                page_sharers.setdefault(path[depth], set()).add(index)
        for sharers in map(frozenset, page_sharers.values()):
            before = next((run for run in runs if run[1] == depth and run[2] == sharers), None)
            if before:
                runs.remove(before)
            if len(sharers) > 1:
                runs.append((before[0] if before else depth, depth + 1, sharers))
    return set(runs)


def found_runs(top: Run, num_new: Rows[int]) -> set[PageRun]:
    def below(run: Run) -> frozenset[int]:
        return frozenset(run.members).union(*(below(child) for child in run.children))

    for run in (top, *all_runs(top)):
        assert run.num_sequences == len(below(run))
        assert run.num_rows == sum(num_new[i] for i in below(run))
    return {(run.start, run.end, below(run)) for run in all_runs(top)}


def test_runs_are_those_that_pages_tell() -> None:
    rng = random.Random(0)
    for _ in range(300):
        cache, texts, tails = PrefixCache(SIZE), [[1]], list[RadixNode]()
        for _ in range(rng.randrange(1, 12)):
            start = rng.choice(texts)
            texts.append(start[: rng.randrange(len(start) + 1)] + [rng.randrange(3) for _ in range(rng.randrange(5))])
            tails.append(add_path(cache, texts[-1], 100 * len(texts)))
        num_new = [rng.choice((1, 4)) for _ in tails]
        top = shared_forest(tails, num_new, cache.root)
        assert found_runs(top, num_new) == shared_runs([pages_of(cache, tail) for tail in tails])
        members = [i for run in (top, *all_runs(top)) for i in run.members]
        assert sorted(members) == list(range(len(tails)))


def test_chains_of_nodes_with_the_same_sequences_are_one_run() -> None:
    cache = PrefixCache(SIZE)
    finished = add_path(cache, [1, 2, 9], 0)  # splits the path of the others, but is not in the step
    tails = [add_path(cache, [1, 2, 3, 4], 10), add_path(cache, [1, 2, 3, 4], 20)]
    cache.release(finished)
    assert tails[0].parent is not cache.root
    assert found_runs(shared_forest(tails, [1, 1], cache.root), [1, 1]) == {(0, 4, frozenset({0, 1}))}


def test_nothing_is_shared_by_one_or_by_strangers() -> None:
    cache = PrefixCache(SIZE)
    tails = [add_path(cache, [1, 2], 0), add_path(cache, [3], 10), cache.root]
    top = shared_forest(tails, [1, 2, 3], cache.root)
    assert (top.children, sorted(top.members), top.num_rows) == ([], [0, 1, 2], 6)


def test_a_leader_is_attached_above_the_pages_that_it_fills() -> None:
    cache = PrefixCache(SIZE)
    upper = add_path(cache, [1, 2], 0)
    lower = add_path(cache, [1, 2, 3, 4], 10)
    cache.hold_again(lower)
    starts = {0: cache.root, 3: cache.root, 4: upper, 5: upper, 7: upper, 8: lower, 9: lower, 100: lower}
    assert attach_nodes([rows_of(lower, start) for start in starts], SIZE) == list(starts.values())


def test_a_sequence_is_attached_above_what_it_alone_holds() -> None:
    cache = PrefixCache(SIZE)
    shared = add_path(cache, [1, 2], 0)
    own = add_path(cache, [1, 2, 3, 4], 10)
    assert attach_nodes([rows_of(shared, 100), rows_of(own, 100)], SIZE) == [shared, shared]
    cache.release(shared)
    assert attach_nodes([rows_of(own, 100)], SIZE) == [cache.root]
