"""Step plans to test with: the one that architecture.md draws, and generated ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from hypothesis import strategies as st

from cascade_llm.plan import CascadeLevel, CascadePlan, StepPlan, int_column


@dataclass(frozen=True)
class PlannedSequence:
    """One sequence of a case: its shared nodes from the root, each a node id with its pages, and its own suffix."""

    nodes: tuple[tuple[int, tuple[int, ...]], ...]
    leaf_pages: tuple[int, ...]
    leaf_len: int
    num_new: int

    @property
    def page_table(self) -> list[int]:
        return [page for _, pages in self.nodes for page in pages] + list(self.leaf_pages)


def level_of(segments: Sequence[tuple[int, Sequence[int], int]]) -> CascadeLevel:
    """A level from its segments: (rows, pages, tokens in the last page)."""
    return CascadeLevel(
        qo_indptr=int_column(accumulate((rows for rows, _, _ in segments), initial=0)),
        kv_page_indptr=int_column(accumulate((len(pages) for _, pages, _ in segments), initial=0)),
        kv_page_indices=int_column(page for _, pages, _ in segments for page in pages),
        kv_last_page_len=int_column(last for _, _, last in segments),
    )


def step_of(sequences: Sequence[PlannedSequence], page_size: int) -> StepPlan:
    """The step plan of sequences in depth-first order; sequence i is in lane 10 + i and draws from its last row."""
    levels = []
    for depth in range(len(sequences[0].nodes)):
        segments = []
        for _, members in groupby(sequences, key=lambda s: [node[0] for node in s.nodes[: depth + 1]]):
            sharers = list(members)
            pages = sharers[0].nodes[depth][1]
            segments.append((sum(s.num_new for s in sharers), pages, page_size if pages else 0))
        levels.append(level_of(segments))
    last = [s.leaf_len - (len(s.leaf_pages) - 1) * page_size for s in sequences]
    levels.append(level_of([(s.num_new, s.leaf_pages, n) for s, n in zip(sequences, last, strict=True)]))

    positions, slots, sample_rows = [], [], []
    for s in sequences:
        shared_len = sum(len(pages) for _, pages in s.nodes) * page_size
        for offset in range(s.leaf_len - s.num_new, s.leaf_len):
            positions.append(shared_len + offset)
            slots.append(s.leaf_pages[offset // page_size] * page_size + offset % page_size)
        sample_rows.append(len(positions) - 1)
    lanes = [10 + i for i in range(len(sequences))]
    return StepPlan(
        step_id=7,
        cascades=(CascadePlan(tuple(levels), page_size),),
        token_ids=int_column([3] * len(positions)),
        positions=int_column(positions),
        slots=int_column(slots),
        lane_rows=int_column(sample_rows[:1]),
        lane_row_lanes=int_column(lanes[:1]),
        sequence_lanes=int_column(lanes),
        sequence_epochs=int_column([1] * len(lanes)),
        sample_rows=int_column(sample_rows),
        sample_lanes=int_column(lanes),
        sample_positions=int_column(positions[row] + 1 for row in sample_rows),
    )


DRAWN = (
    PlannedSequence(nodes=((0, (0, 1)),), leaf_pages=(2,), leaf_len=2, num_new=1),
    PlannedSequence(nodes=((0, (0, 1)),), leaf_pages=(3,), leaf_len=1, num_new=1),
    PlannedSequence(nodes=((1, ()),), leaf_pages=(5, 6), leaf_len=7, num_new=1),
)
"""Sequences A, B and C of claude_docs/architecture.md, with pages of 4 tokens."""


@st.composite
def sequence_lists(draw: st.DrawFn, page_size: int) -> list[PlannedSequence]:
    """Sequences in depth-first order over a random forest; every page id is used by one node or one leaf."""
    num_shared_levels = draw(st.integers(0, 3))
    num_sequences = draw(st.integers(1, 8))
    fresh_pages = iter(draw(st.permutations(range(8 * 3 * 3 + 8 * 4))))
    sequences: list[PlannedSequence] = []
    path: list[tuple[int, tuple[int, ...]]] = []
    next_node = 0
    for index in range(num_sequences):
        # how many nodes from the root this sequence has in common with the one before it
        kept = draw(st.integers(0, num_shared_levels)) if index else 0
        path = path[:kept]
        while len(path) < num_shared_levels:
            path.append((next_node, tuple(next(fresh_pages) for _ in range(draw(st.integers(0, 3))))))
            next_node += 1
        leaf_len = draw(st.integers(1, 4 * page_size))
        leaf_pages = tuple(next(fresh_pages) for _ in range(-(-leaf_len // page_size)))
        num_new = draw(st.integers(1, leaf_len))
        sequences.append(PlannedSequence(tuple(path), leaf_pages, leaf_len, num_new))
    return sequences
