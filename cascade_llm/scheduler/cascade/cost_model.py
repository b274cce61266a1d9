"""What a cascade plan costs, in seconds per layer, so that a planner can choose.

A segment joins `rows` query rows with `tokens` of K/V. It reads the K/V once, whatever the number of rows, and does
4 * tokens * rows * num_qo_heads * head_dim flops (two products). A level takes the longest of three: all its bytes over
the bandwidth, all its flops over the rate (a roofline, Williams et al. 2009), and its longest item of work on the one
processor that it runs on (`tiling`). Launches, segments and the merge cost besides. What leaves read again after
another leaf comes from the last-level cache where it fits.

Choosing segments needs costs that add up segment by segment: `shared_segment_s` and `leaf_tokens_s` take each segment's
own roofline. `plan_s` prices a whole plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from operator import itemgetter
from typing import NamedTuple

from cascade_llm.plan import CascadeLevel, CascadePlan
from cascade_llm.scheduler.cascade.device_costs import DeviceCosts
from cascade_llm.tiling import (
    chunk_len,
    is_wide,
    level_tile,
    max_tiles,
    num_tiles,
    segment_tile,
    tile_for,
)

__all__ = [
    "AttentionShape",
    "CostModel",
    "PlanWork",
    "plan_work",
    "unit_s",
]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One layer's attention."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    kv_dtype_bytes: float
    """Of a number of K or V, its share of a scale included."""

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token in one layer."""
        return round(2 * self.num_kv_heads * self.head_dim * self.kv_dtype_bytes)

    @property
    def flops_per_row_token(self) -> int:
        """Both products, of one query row and one token."""
        return 4 * self.num_qo_heads * self.head_dim

    @property
    def merged_bytes_per_row(self) -> float:
        """Two outputs read and one written, with their log-sum-exps."""
        return self.num_qo_heads * (3 * self.head_dim * self.kv_dtype_bytes + 8)


CHUNK_STEP = 16
"""Tokens by which chunks get longer: the usual page."""

Amounts = dict[str, float]
"""By the name of a constant of `DeviceCosts`."""

Segments = Sequence[tuple[int, int]]
"""(tokens, rows) of each segment that holds tokens."""


class PlanWork(NamedTuple):
    """What a plan does, as far as its cost depends on it."""

    shared: Sequence[Segments]
    """By level."""
    leaf: Segments
    reread_tokens: int = 0
    """Of the leaf's tokens those that another leaf segment has read before."""
    common_tokens: int = 0
    """How many different tokens these are."""


def plan_work(plan: CascadePlan) -> PlanWork:
    """The work of a plan."""
    leaf = plan.leaf
    pages = Counter(leaf.kv_page_indices)
    common = [count for count in pages.values() if count > 1]
    return PlanWork(
        [_segments(level, plan.page_size) for level in plan.shared_levels],
        _segments(leaf, plan.page_size),
        plan.page_size * (sum(common) - len(common)),
        plan.page_size * len(common),
    )


def _segments(level: CascadeLevel, page_size: int) -> Segments:
    rows = [end - start for start, end in pairwise(level.qo_indptr)]
    pages = [end - start for start, end in pairwise(level.kv_page_indptr)]
    return [
        ((num_pages - 1) * page_size + last, num_rows)
        for num_rows, num_pages, last in zip(rows, pages, level.kv_last_page_len, strict=True)
        if num_pages
    ]


@dataclass(frozen=True)
class CostModel:
    """Predicted seconds per layer."""

    shape: AttentionShape
    costs: DeviceCosts

    def shared_segment_s(self, tokens: int, rows: int) -> float:
        """A shared segment of `tokens` full-page tokens under `rows` rows."""
        costs, shape = self.costs, self.shape
        bytes_s = shape.kv_bytes_per_token / costs.shared_bytes_per_s
        flops_s = self._padded(rows) * shape.flops_per_row_token / costs.shared_flops_per_s
        return tokens * max(bytes_s, flops_s) + costs.segment_s

    def leaf_tokens_s(self, tokens: int, rows: int) -> float:
        """`tokens` more in the leaf segment of a sequence that has `rows` rows."""
        costs, shape = self.costs, self.shape
        bytes_s = shape.kv_bytes_per_token / costs.leaf_bytes_per_s
        flops_s = rows * shape.flops_per_row_token / costs.leaf_flops_per_s
        return tokens * max(bytes_s, flops_s)

    def level_s(self, rows: int) -> float:
        """One more shared level over a step of `rows` rows: launches, and outputs and LSE read and merged."""
        return self.costs.level_s + rows * self.shape.merged_bytes_per_row / self.costs.merge_bytes_per_s

    def with_common_tokens(self, tokens: int) -> CostModel:
        """The model for a step whose sequences have `tokens` different tokens in common.

        Where these fit the last-level cache, leaves read them from memory once and then from there.
        """
        if not self._fits(tokens):
            return self
        return self._from_cache

    @cached_property
    def _from_cache(self) -> CostModel:
        """All reading is priced as from the cache: that each token comes from memory once is the same in every plan."""
        costs = self.costs
        first_s = max(0.0, 1 / costs.leaf_bytes_per_s - 1 / costs.cached_bytes_per_s)
        shared_s = max(0.0, 1 / costs.shared_bytes_per_s - first_s)
        cached = replace(
            costs,
            leaf_bytes_per_s=max(costs.leaf_bytes_per_s, costs.cached_bytes_per_s),
            shared_bytes_per_s=1 / shared_s if shared_s else float("inf"),
            llc_bytes=0,
        )
        return replace(self, costs=cached)

    @property
    def is_tiled(self) -> bool:
        """Whether a level can take longer than its bytes and flops, so that it matters which segments share one."""
        return self.costs.num_processors > 1

    def is_wide(self, rows: int) -> bool:
        """Whether a shared segment of so many rows wants the wide tile."""
        return is_wide(rows, self._group_size)

    def longest_balanced(self, segments: Segments) -> int:
        """Tokens that a segment can have and not hold its level up, while nothing is cut: a fair share of the rest."""
        items = sorted([(tokens, tokens * self._num_tiles(rows)) for tokens, rows in segments], reverse=True)
        rest = sum([work for _, work in items])
        for tokens, work in items:
            if tokens * self._max_tiles <= 2 * rest:  # an item alone on a processor runs twice as fast as one of two
                return tokens
            rest -= work
        return 0

    def plan_s(self, work: PlanWork) -> float:
        """A whole plan."""
        return _price(self.costs, self.amounts(work))

    def leaf_s(self, leaf: Segments) -> float:
        """The leaf level of a plan."""
        return _price(self.costs, self._level("leaf", leaf, _num_rows(leaf)))

    def levels_s(self, levels: Sequence[Segments], num_rows: int) -> float:
        """The levels above the leaf, in a step of so many rows, with launches and merges."""
        alone = sum([_price(self.costs, self._level("shared", segments, num_rows)) for segments in levels])
        return alone + len(levels) * self.level_s(num_rows) + sum(map(len, levels)) * self.costs.segment_s

    def imbalance_s(self, work: PlanWork) -> float:
        """How long processors wait for one of them, or compute rows that only fill tiles, in all levels together: what
        a better arrangement can gain at most."""
        num_rows, costs = _num_rows(work.leaf), self.costs
        waiting = 0.0
        for kind, segments in (("leaf", work.leaf), *(("shared", level) for level in work.shared)):
            evenly = max(_price(costs, option) for option in self._evenly(kind, segments))
            waiting += _price(costs, self._level(kind, segments, num_rows)) - evenly
        return waiting

    def amounts(self, work: PlanWork) -> Amounts:
        """How much a plan uses of what each constant stands for, as far as it decides the time."""
        reread = work.reread_tokens if self._fits(work.common_tokens) else 0
        num_rows = _num_rows(work.leaf)
        parts = [self._level("leaf", work.leaf, num_rows, reread)]
        parts += [self._level("shared", segments, num_rows) for segments in work.shared]
        total: Amounts = {
            "step_s": 1,
            "leaf_segment_s": len(work.leaf),
            "level_s": len(work.shared),
            "segment_s": sum(map(len, work.shared)),
            "merge_bytes_per_s": len(work.shared) * num_rows * self.shape.merged_bytes_per_row,
        }
        for part in parts:
            for name, amount in part.items():
                total[name] = total.get(name, 0) + amount
        return total

    def _level(self, kind: str, segments: Segments, num_rows: int, reread: int = 0) -> Amounts:
        """What decides the time of a level: its bytes, its flops, or the longest item of work."""
        tile = self._tile(kind, segments, num_rows)
        options = self._evenly(kind, segments, tile, reread)
        prices = [_price(self.costs, option) for option in options]
        if self.is_tiled and segments:
            whole = max(segments)[0]
            items = self._items(kind, segments, tile, whole)
            if max([seconds for seconds, _ in items]) > max(prices):
                items = self._items(kind, segments, tile, self._chunk_len(segments, num_rows, tile, whole))
            return max([*zip(prices, options, strict=True), *items], key=itemgetter(0))[1]
        return options[prices.index(max(prices))]

    def _evenly(self, kind: str, segments: Segments, tile: int | None = None, reread: int = 0) -> list[Amounts]:
        """The bytes and the flops of a level, spread evenly over the processors; without a tile, each segment is in the
        one that suits it."""
        token_bytes, tokens = self.shape.kv_bytes_per_token, sum([tokens for tokens, _ in segments])
        computed = {
            rows: rows if kind == "leaf" else self._padded(rows, tile) for rows in {rows for _, rows in segments}
        }
        row_tokens = sum([tokens * computed[rows] for tokens, rows in segments])
        return [
            {f"{kind}_bytes_per_s": token_bytes * (tokens - reread), "cached_bytes_per_s": token_bytes * reread},
            {f"{kind}_flops_per_s": self.shape.flops_per_row_token * row_tokens},
        ]

    def _items(self, kind: str, segments: Segments, tile: int, length: int) -> list[tuple[float, Amounts]]:
        """Seconds and amounts of one item's bytes, and of its flops: on one processor, that is so many times as much
        on a device that has a part of each rate to itself."""
        shape, processors = self.shape, self.costs.num_processors
        packed_rows = min(tile, self._group_size * max([rows for _, rows in segments]))
        options: list[Amounts] = [
            {f"{kind}_bytes_per_s": shape.kv_bytes_per_token / shape.num_kv_heads * length * processors},
            {f"{kind}_flops_per_s": shape.flops_per_row_token / shape.num_qo_heads * packed_rows * length * processors},
        ]
        return [(_price(self.costs, option), option) for option in options]

    def _chunk_len(self, segments: Segments, num_rows: int, tile: int, whole: int) -> int:
        """Tokens of the longest item: a chunk where K/V are cut, else all of the longest segment."""
        if len(segments) >= self._max_tiles:
            return whole
        tiles = [num_tiles(rows, self._group_size, tile) for _, rows in segments]
        empty = num_tiles(num_rows - _num_rows(segments), self._group_size, tile)
        if sum(tiles) + empty >= self._max_tiles:
            return whole
        lens = [-(-tokens // CHUNK_STEP) for tokens, _ in segments]
        least = max(1, self.costs.split_tokens // CHUNK_STEP)
        return min(whole, CHUNK_STEP * chunk_len(tiles, lens, self._max_tiles - empty, least))

    def _tile(self, kind: str, segments: Segments, num_rows: int) -> int:
        """Of a shared level the one that suits it; of leaves the one for the mean."""
        if not self.is_tiled:
            return self.costs.tile_rows
        if kind == "leaf":
            return tile_for(num_rows * self._group_size / max(1, len(segments)))
        return level_tile([rows for _, rows in segments], num_rows, self._group_size, self._max_tiles)

    def _num_tiles(self, rows: int) -> int:
        return num_tiles(rows, self._group_size, segment_tile(rows, self._group_size))

    def _padded(self, rows: int, tile: int | None = None) -> float:
        """Rows, as many as fill the tiles that they take; without a tile, the one that suits them."""
        if tile is None:
            tile = segment_tile(rows, self._group_size) if self.is_tiled else self.costs.tile_rows
        return num_tiles(rows, self._group_size, tile) * tile / self._group_size

    @cached_property
    def _group_size(self) -> int:
        return self.shape.num_qo_heads // self.shape.num_kv_heads

    @cached_property
    def _max_tiles(self) -> int:
        return max_tiles(self.costs.num_processors, self.shape.num_kv_heads)

    def _fits(self, tokens: int) -> bool:
        return 0 < tokens * self.shape.kv_bytes_per_token <= self.costs.llc_bytes


def _num_rows(segments: Segments) -> int:
    return sum([rows for _, rows in segments])


def unit_s(costs: DeviceCosts, name: str) -> float:
    """Seconds for one of what a constant counts: a byte, a flop, a segment, a level."""
    value = float(getattr(costs, name))
    return 1 / value if name.endswith("_per_s") else value


def _price(costs: DeviceCosts, amounts: Amounts) -> float:
    return sum([amount * unit_s(costs, name) for name, amount in amounts.items()])
