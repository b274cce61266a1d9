"""Decode batches whose prompts form a regular tree, and every plan that could be made of them."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

from cascade_llm.errors import ConfigError
from cascade_llm.plan import CascadeLevel, CascadePlan, int_column
from cascade_llm.scheduler.cascade.balance import levels_by_depth
from cascade_llm.scheduler.cascade.choice import SegmentChoice, SegmentCosts, choices_by_levels
from cascade_llm.scheduler.cascade.cost_model import plan_work
from cascade_llm.scheduler.cascade.layout import Placement, level_columns, place_segments
from cascade_llm.scheduler.cascade.tree import Run, preorder

__all__ = ["AttentionCase"]

PAGE_SIZE = 16


@dataclass(frozen=True)
class AttentionCase:
    """A tree given as PAT (ASPLOS'26) gives its benchmark: nodes per level, and tokens of each.

    `1,4,256/512,128,32` is one prefix of 512 tokens, below it 4 of 128, below these 256 sequences with 32 tokens of
    their own, each of which decodes one token.
    """

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.nodes or len(self.nodes) != len(self.tokens) or min(*self.nodes, *self.tokens, 1) < 1:
            raise ConfigError(f"{self}: give as many numbers of tokens as of nodes, all 1 or larger")
        if any(parents > children for parents, children in pairwise(self.nodes)):
            raise ConfigError(f"{self}: a level has no fewer nodes than the one above")
        if any(tokens % PAGE_SIZE for tokens in self.tokens[:-1]):
            raise ConfigError(f"{self}: shared tokens come in pages of {PAGE_SIZE}")

    @classmethod
    def parse(cls, text: str) -> AttentionCase:
        """From its name, "1,4,256/512,128,32"."""
        try:
            nodes, tokens = (tuple(int(number) for number in part.split(",")) for part in text.split("/"))
        except ValueError:
            raise ConfigError(f"{text!r} is no tree: write nodes and tokens as '1,4,256/512,128,32'") from None
        return cls(nodes, tokens)

    def __str__(self) -> str:
        return "/".join(",".join(map(str, numbers)) for numbers in (self.nodes, self.tokens))

    @property
    def num_sequences(self) -> int:
        """Sequences, each with one row."""
        return self.nodes[-1]

    @property
    def num_tokens(self) -> int:
        """Different tokens of K/V."""
        return sum(nodes * tokens for nodes, tokens in zip(self.nodes, self.tokens, strict=True))

    @property
    def num_pages(self) -> int:
        """Pages that hold them."""
        return sum(nodes * -(-tokens // PAGE_SIZE) for nodes, tokens in zip(self.nodes, self.tokens, strict=True))

    @property
    def shared_depths(self) -> tuple[int, ...]:
        """The levels of the tree whose nodes have more than one sequence each."""
        return tuple(depth for depth, nodes in enumerate(self.nodes[:-1]) if self.num_sequences >= 2 * nodes)

    def subsets(self, max_levels: int) -> Iterator[tuple[int, ...]]:
        """Every choice of depths that become levels, at most so many; the first is none: plain attention."""
        for size in range(min(max_levels, len(self.shared_depths)) + 1):
            yield from combinations(self.shared_depths, size)

    def chosen(self, costs: SegmentCosts, max_levels: int) -> tuple[int, ...]:
        """The depths that the planner makes levels under these costs: the best of each number, or none, as a whole."""
        forest, num_new = self._forest(), [1] * self.num_sequences
        common_tokens = PAGE_SIZE * sum(run.end - run.start for run in preorder(forest))
        by_end = {self._end_page(depth): depth for depth in self.shared_depths}
        choices = choices_by_levels(
            forest, num_new, PAGE_SIZE, costs.with_common_tokens(common_tokens), max_levels=max_levels, min_tokens=1
        )
        options = [tuple(sorted({by_end[run.end] for run in choice.start_pages})) for choice in choices]
        return min([(), *options], key=lambda depths: costs.plan_s(plan_work(self.plan(depths))))

    def plan(self, depths: Collection[int] = ()) -> CascadePlan:
        """The plan in which the nodes of these depths are segments and all others are folded."""
        forest, num_new, tables = self._forest(), [1] * self.num_sequences, self._page_tables()
        ends = {self._end_page(depth) for depth in depths}
        starts: dict[Run, int] = {}
        above = dict.fromkeys(forest.children, 0)
        for run in preorder(forest)[1:]:
            start = above[run]
            if run.end in ends:
                starts[run], start = start, run.end
            above.update(dict.fromkeys(run.children, start))
        choice = SegmentChoice(starts, len(ends))
        placement = place_segments(forest, choice, num_new, levels_by_depth(forest, choice))
        levels: list[CascadeLevel] = []
        for segments in placement.levels:
            boundaries = levels[-1].qo_indptr.tolist() if levels else []
            levels.append(level_columns(segments, boundaries, self.num_sequences, tables, PAGE_SIZE))
        return CascadePlan((*levels, self._leaf(placement, tables)), PAGE_SIZE)

    def _leaf(self, placement: Placement, tables: Sequence[array[int]]) -> CascadeLevel:
        own = [tables[i][placement.prefix_pages[i] :] for i in placement.order]
        indptr, pages = array("i", [0]), array("i")
        for table in own:
            pages.extend(table)
            indptr.append(len(pages))
        last_page_len = (self.tokens[-1] - 1) % PAGE_SIZE + 1
        rows = range(self.num_sequences + 1)
        return CascadeLevel(*map(int_column, (rows, indptr, pages, [last_page_len] * self.num_sequences)))

    def prompts(self) -> Iterator[list[int]]:
        """Token ids of each sequence; nodes differ in every token."""
        for sequence in range(self.num_sequences):
            ids: list[int] = []
            for depth, length in enumerate(self.tokens):
                ids += [1 + (depth << 24 | self._node(sequence, depth))] * length
            yield ids

    def _forest(self) -> Run:
        """The shared runs; a node of one sequence is part of what is below it."""
        top = Run(0, 0)
        above, owners = [top], [0] * self.num_sequences
        for depth in self.shared_depths:
            nodes = [Run(self._end_page(depth - 1), self._end_page(depth)) for _ in range(self.nodes[depth])]
            for index in range(self.num_sequences):
                parent, node = above[owners[index]], nodes[self._node(index, depth)]
                if node not in parent.children:
                    parent.children.append(node)
                node.num_sequences += 1
                node.num_rows += 1
            owners = [self._node(index, depth) for index in range(self.num_sequences)]
            above = nodes
        for index, owner in enumerate(owners):
            above[owner].members.append(index)
        top.num_sequences = top.num_rows = self.num_sequences
        return top

    def _page_tables(self) -> list[array[int]]:
        """The pages of each sequence; nodes have consecutive pages, level after level."""
        tables = [array("i") for _ in range(self.num_sequences)]
        first = 0
        for depth, (nodes, tokens) in enumerate(zip(self.nodes, self.tokens, strict=True)):
            num_pages = -(-tokens // PAGE_SIZE)
            for index, table in enumerate(tables):
                start = first + num_pages * self._node(index, depth)
                table.extend(range(start, start + num_pages))
            first += nodes * num_pages
        return tables

    def _node(self, sequence: int, depth: int) -> int:
        return sequence * self.nodes[depth] // self.num_sequences

    def _end_page(self, depth: int) -> int:
        return sum(self.tokens[: depth + 1]) // PAGE_SIZE if depth >= 0 else 0
