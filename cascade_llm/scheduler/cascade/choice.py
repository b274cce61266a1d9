"""Which shared runs become segments of a level, and which are folded into what is below them.

The problem. Given the tree of shared runs, choose a set of runs that become *segments*. A run that is not chosen is
folded: its tokens are carried down into the nearest chosen run on each path below it, or into the leaf segments. So a
segment holds its own run and the folded runs directly above it. No path may have more chosen runs than there are
levels. The cost is the sum over segments and leaf segments, each linear in its tokens.

The algorithm. All that a subtree needs to know of what is above it is the page at which the carried tokens start (the
end of the nearest chosen run) and how many levels are left. For each number of levels its best cost is a piecewise
linear function of that page (`carried_cost`). Bottom up, from the functions of its children, a run's is

    folded     the children's sum, plus a line for the sequences that end here
    shared     a line: its own segment, and the children with one level less and nothing carried
    best       the lower of the two; a range of start pages where sharing is cheaper is all that is remembered

Going down again from the root, these ranges give the choice, for each number of levels. The result is optimal. Every
run brings in at most two pieces, and a sum moves the pieces of the smaller functions only, so that with n runs and k
levels it takes O(k * n * log n) steps, however deep the tree is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from cascade_llm.scheduler.cascade.carried_cost import CarriedCost
from cascade_llm.scheduler.cascade.cost_model import PlanWork
from cascade_llm.scheduler.cascade.tree import Run, preorder

__all__ = ["SegmentChoice", "SegmentCosts", "TokensRead", "choices_by_levels"]


class SegmentCosts(Protocol):
    """What parts of a plan cost; `CostModel` in seconds, `TokensRead` in tokens. All are linear in `tokens`."""

    def shared_segment_s(self, tokens: int, rows: int) -> float:
        """A shared segment; of no tokens, what it costs besides."""
        ...

    def leaf_tokens_s(self, tokens: int, rows: int) -> float:
        """Tokens that a sequence with `rows` rows reads by itself; none cost nothing."""
        ...

    def level_s(self, rows: int) -> float:
        """One more shared level."""
        ...

    def with_common_tokens(self, tokens: int) -> SegmentCosts:
        """The costs of a step whose sequences have so many different tokens in common."""
        ...

    def plan_s(self, work: PlanWork) -> float:
        """A whole plan."""
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

    def with_common_tokens(self, tokens: int) -> TokensRead:
        """The same."""
        return self

    def plan_s(self, work: PlanWork) -> float:
        """Tokens of all segments."""
        return sum(tokens for segments in (*work.shared, work.leaf) for tokens, _ in segments)


class SegmentChoice(NamedTuple):
    """The chosen runs, each with the page at which its segment starts, and the levels that they need."""

    start_pages: dict[Run, int]
    num_levels: int


Shares = dict[Run, list[range]]
"""For each run and number of levels left, the start pages of carried tokens for which it is best a segment."""


def choices_by_levels(
    top: Run, num_new: Sequence[int], page_size: int, costs: SegmentCosts, *, max_levels: int, min_tokens: int
) -> Iterator[SegmentChoice]:
    """The cheapest choice for the best number of shared levels, for one less and for one more.

    Best is what the sum says, levels paid for; a level that saves nothing is left out. No segment is shorter than
    `min_tokens`.
    """
    best, shares = _best_costs(top, num_new, page_size, costs, max_levels, -(-min_tokens // page_size))
    level_s = costs.level_s(top.num_rows)
    number = min(range(max_levels + 1), key=lambda levels: best[levels] + levels * level_s)
    for levels in range(max(1, number - 1), min(number + 1, max_levels) + 1):
        if best[levels] < best[levels - 1]:
            yield _collect(top, shares, levels)


def _best_costs(
    top: Run, num_new: Sequence[int], page_size: int, costs: SegmentCosts, max_levels: int, min_pages: int
) -> tuple[list[float], Shares]:
    """For each number of levels the least cost of the whole tree, and where runs are shared."""
    page_s = {rows: costs.leaf_tokens_s(page_size, rows) for rows in set(num_new)}
    functions: dict[Run, list[CarriedCost]] = {}
    shares: Shares = {}
    for run in reversed(preorder(top)):
        start, end = run.start, run.end
        by_levels = functions[run] = _sums([functions.pop(child) for child in run.children], max_levels)
        nothing_carried = [function.end_at(end) for function in by_levels]
        member_s = sum([page_s[num_new[i]] for i in run.members])
        for function in by_levels:
            function.add_line(complex(member_s * end, member_s))
        if run is top:
            break
        segment_s = costs.shared_segment_s(0, run.num_rows)
        shared_s = costs.shared_segment_s(page_size, run.num_rows) - segment_s
        last_start = min(start, end - min_pages)
        shares[run] = [range(0)]
        for levels in range(1, max_levels + 1):
            shared = complex(segment_s + nothing_carried[levels - 1] + shared_s * end, shared_s)
            function = by_levels[levels]
            function.end_at(start)
            shares[run].append(function.undercut(shared, last_start) if last_start >= 0 else range(0))
    return [function.end_at(top.end) for function in functions[top]], shares


def _sums(functions: Sequence[list[CarriedCost]], max_levels: int) -> list[CarriedCost]:
    """For each number of levels the sum over the children; takes over the first child's functions."""
    if not functions:
        return [CarriedCost() for _ in range(max_levels + 1)]
    sums = functions[0]
    for others in functions[1:]:
        for function, other in zip(sums, others, strict=True):
            function.add(other)
    return sums


def _collect(top: Run, shares: Shares, num_levels: int) -> SegmentChoice:
    """Follow the best decisions from the root down."""
    start_pages: dict[Run, int] = {}
    fewest_left = num_levels
    stack = [(child, top.end, num_levels) for child in top.children]
    while stack:
        run, start, left = stack.pop()
        if start in shares[run][left]:
            start_pages[run] = start
            start, left = run.end, left - 1
            fewest_left = min(fewest_left, left)
        stack.extend([(child, start, left) for child in run.children])
    return SegmentChoice(start_pages, num_levels - fewest_left)
