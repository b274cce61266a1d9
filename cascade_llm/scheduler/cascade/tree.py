"""The part of the prefix tree that the sequences of one step share."""

from __future__ import annotations

from typing import NamedTuple

from cascade_llm.scheduler.prefix_cache import RadixNode
from cascade_llm.scheduler.sequence import Sequence

__all__ = ["PlannedRows", "Run", "attach_nodes", "preorder", "shared_forest", "without_pages_before"]


class PlannedRows(NamedTuple):
    """What one sequence computes in a step: `num_new` tokens from `start_len` on."""

    sequence: Sequence
    start_len: int
    num_new: int
    samples: tuple[Sequence, ...] = ()
    """Who gets a token drawn from the last row: the sequence itself, and forks of it at the end of a prompt."""
    drafts: tuple[int, ...] = ()
    """Proposed tokens in its last rows; from each of these rows and the one before one is drawn too."""


class Run:
    """Pages `start` to `end` of the tables of a set of sequences, the same pages for all of them.

    The root is an empty run. Any other has at least two sequences below it, and two of them part at its end.
    """

    __slots__ = ("children", "end", "members", "num_rows", "num_sequences", "start")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.children: list[Run] = []
        self.members: list[int] = []
        """Sequences (their index in the step) that share nothing beyond this run."""
        self.num_sequences = 0
        self.num_rows = 0


def attach_nodes(rows: list[PlannedRows], page_size: int) -> list[RadixNode]:
    """For each sequence the deepest node of its path that it can share in this step.

    That node lies wholly before its new tokens: what a sequence writes in this step belongs to its leaf segment, where
    the causal mask is. So a leader that fills shared pages is attached above them in that step, and its followers
    below. And another sequence holds it too: while a sequence extends its own path, it stays attached where it is.
    """
    nodes = []
    for sequence, start_len, _, _, _ in rows:
        node = sequence.tail
        assert node is not None
        limit = start_len // page_size
        while node.parent is not None and (node.num_holds <= 1 or node.end > limit):
            node = node.parent
        nodes.append(node)
    return nodes


def shared_forest(nodes: list[RadixNode], num_new: list[int], root: RadixNode) -> Run:
    """The runs that at least two of the sequences share, as a tree below an empty root.

    Takes time linear in the tree nodes on the sequences' paths.
    """
    top = Run(0, 0)
    runs = {root: top}
    for index, node in enumerate(nodes):
        _run_of(node, runs).members.append(index)
    for run in reversed(preorder(top)):
        _fold_unshared(run, num_new)
        if run is not top and not run.members and len(run.children) == 1:
            _absorb(run, run.children[0])
    return top


def without_pages_before(top: Run, page: int) -> Run:
    """A forest without the pages before one; its runs, and the empty root, begin there at the earliest."""
    kept = Run(page, page)
    kept.members, kept.num_sequences, kept.num_rows = list(top.members), top.num_sequences, top.num_rows
    stack = list(top.children)
    while stack:
        run = stack.pop()
        if run.end <= page:
            kept.members.extend(run.members)
            stack.extend(run.children)
        else:
            run.start = max(run.start, page)
            kept.children.append(run)
    return kept


def _run_of(node: RadixNode, runs: dict[RadixNode, Run]) -> Run:
    """The run of a tree node; makes it, and those above it, where they are new."""
    found = runs.get(node)
    if found is not None:
        return found
    made = lower = runs[node] = Run(node.start, node.end)
    while True:
        assert node.parent is not None
        node = node.parent
        upper = runs.get(node)
        if upper is not None:
            upper.children.append(lower)
            return made
        upper = runs[node] = Run(node.start, node.end)
        upper.children.append(lower)
        lower = upper


def preorder(top: Run) -> list[Run]:
    """All runs, parents first."""
    order, stack = [], [top]
    while stack:
        run = stack.pop()
        order.append(run)
        stack.extend(run.children)
    return order


def _fold_unshared(run: Run, num_new: list[int]) -> None:
    """Turn children with one sequence into members and count what is below; children are done already."""
    shared = []
    for child in run.children:
        if child.num_sequences == 1:
            run.members.append(child.members[0])
        else:
            shared.append(child)
    run.children = shared
    run.num_sequences = len(run.members) + sum(child.num_sequences for child in shared)
    run.num_rows = sum(num_new[i] for i in run.members) + sum(child.num_rows for child in shared)


def _absorb(run: Run, child: Run) -> None:
    """Lengthen a run by its only child, which has the same sequences."""
    run.end = child.end
    run.children, run.members = child.children, child.members
