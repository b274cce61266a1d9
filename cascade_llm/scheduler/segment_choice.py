"""Which shared runs become segments of a level, and which are folded into what is below them.

The problem. Given the tree of shared runs, choose a set of runs that become *segments*. A run that is not chosen is
folded: its tokens are carried down into the nearest chosen run on each path below it, or into the leaf segments. So a
segment holds its own run and the folded runs directly above it. No path may have more chosen runs than there are
levels. The cost is the sum over segments and leaf segments, plus a fixed cost for each level used.

The algorithm. All that a subtree needs to know of what is above it is where the carried tokens start (at the end of
the nearest chosen ancestor) and how many levels are left. So the best cost of a subtree is a function of these two,
computed bottom up; trying each number of levels at the top finds the optimum of the whole. With n runs, depth d and k
levels that takes O(n * d * k) time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from cascade_llm.scheduler.prefix_forest import Run

__all__ = ["Choice", "SegmentCosts", "TokensRead", "choose_segments"]


class SegmentCosts(Protocol):
    """What parts of a plan cost; `CostModel` in seconds, `TokensRead` in tokens."""

    def shared_segment_s(self, tokens: int, rows: int) -> float:
        """A shared segment."""
        ...

    def leaf_tokens_s(self, tokens: int, rows: int) -> float:
        """Tokens that a sequence with `rows` rows reads by itself."""
        ...

    def level_s(self, rows: int) -> float:
        """One more shared level."""
        ...


@dataclass(frozen=True)
class TokensRead:
    """Counts tokens of K/V read and nothing else: what `cascade_shared_prefix_len` puts in the cost model's place."""

    def shared_segment_s(self, tokens: int, rows: int) -> float:
        """Read once."""
        return tokens

    def leaf_tokens_s(self, tokens: int, rows: int) -> float:
        """Read once for this sequence."""
        return tokens

    def level_s(self, rows: int) -> float:
        """Free."""
        return 0.0


class Choice(NamedTuple):
    """The chosen runs, each with the page at which its segment starts, and the levels that they need."""

    start_pages: dict[Run, int]
    num_levels: int


class _Best(NamedTuple):
    cost: float
    share: bool


def choose_segments(
    top: Run, num_new: Rows[int], page_size: int, costs: SegmentCosts, *, max_levels: int, min_tokens: int
) -> Choice:
    """The cheapest choice with at most `max_levels` shared levels and no segment shorter than `min_tokens`."""
    order, starts = _paths(top)
    tables: dict[Run, dict[tuple[int, int], _Best]] = {}
    for run in reversed(order):
        member_rows = Counter(num_new[i] for i in run.members)
        table = tables[run] = {}
        for left in range(max_levels + 1):
            shared = _shared_below(run, tables, left) if left and run is not top else None
            for start in starts[run]:
                tokens = (run.end - start) * page_size
                best = _Best(_folded(run, tables, member_rows, costs, tokens, start, left), share=False)
                if shared is not None and tokens >= min_tokens:
                    cost = shared + costs.shared_segment_s(tokens, run.num_rows)
                    best = min(best, _Best(cost, share=True))
                table[start, left] = best
    num_levels = min(
        range(max_levels + 1), key=lambda left: tables[top][0, left].cost + left * costs.level_s(top.num_rows)
    )
    return _collect(top, tables, num_levels)


def _paths(top: Run) -> tuple[list[Run], dict[Run, tuple[int, ...]]]:
    """Runs, parents first; and for each the pages at which tokens carried into it can start."""
    order, stack = [], [top]
    starts: dict[Run, tuple[int, ...]] = {top: (0,)}
    while stack:
        run = stack.pop()
        order.append(run)
        for child in run.children:
            starts[child] = starts[run] if run is top else (*starts[run], run.end)
            stack.append(child)
    return order, starts


def _folded(
    run: Run,
    tables: dict[Run, dict[tuple[int, int], _Best]],
    member_rows: Counter[int],
    costs: SegmentCosts,
    tokens: int,
    start: int,
    left: int,
) -> float:
    """Cost below `run` when the tokens from page `start` on are carried further down."""
    members = sum(count * costs.leaf_tokens_s(tokens, rows) for rows, count in member_rows.items()) if tokens else 0.0
    return members + sum(tables[child][start, left].cost for child in run.children)


def _shared_below(run: Run, tables: dict[Run, dict[tuple[int, int], _Best]], left: int) -> float:
    """Cost below `run` when it is a segment: nothing is carried into what follows."""
    return sum(tables[child][run.end, left - 1].cost for child in run.children)


def _collect(top: Run, tables: dict[Run, dict[tuple[int, int], _Best]], num_levels: int) -> Choice:
    """Follow the best decisions from the root down."""
    start_pages: dict[Run, int] = {}
    deepest = 0
    stack = [(top, 0, num_levels)]
    while stack:
        run, start, left = stack.pop()
        if tables[run][start, left].share:
            start_pages[run] = start
            start, left = run.end, left - 1
            deepest = max(deepest, num_levels - left)
        stack.extend((child, start, left) for child in run.children)
    return Choice(start_pages, deepest)
