"""Random cascade plans: forests of sequences whose pages are shared level by level, made without the scheduler."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from cascade_llm.kv_cache.paged_kv_cache import KVLayout, KVScale, PagedKVCache
from cascade_llm.plan import CascadeLevel, CascadePlan, int_column

__all__ = ["CascadeCase", "CaseChoices", "cascade_case", "make_level", "pool_with_only", "single_level_plan"]


@dataclass(frozen=True, kw_only=True)
class CaseChoices:
    """What a generated case must have; what is None is left to chance."""

    page_size: int | None = None
    num_sequences: int | None = None
    num_shared_levels: int | None = None
    heads: tuple[int, int, int] | None = None
    """KV heads, query heads per KV head, head_dim."""
    decode: bool = False
    """One row per sequence."""
    identical: bool = False
    """All sequences have one length, and `pool_with_only` the same K/V for all."""
    window: bool = True
    """A sliding window now and then, where nothing is shared."""


ANY = CaseChoices()


@dataclass(frozen=True)
class CascadeCase:
    """A valid plan and what it was made from."""

    plan: CascadePlan
    page_tables: list[list[int]]
    num_pages: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    identical: bool = False

    @property
    def num_qo_heads(self) -> int:
        """Query heads."""
        return self.num_kv_heads * self.group_size

    def __str__(self) -> str:
        levels = "; ".join(
            f"qo {list(level.qo_indptr)} pages {list(level.kv_page_indptr)} last {list(level.kv_last_page_len)}"
            for level in self.plan.levels
        )
        heads = f"{self.num_qo_heads}/{self.num_kv_heads} heads x {self.head_dim}"
        return f"page_size {self.plan.page_size}, window {self.plan.window_len}, {heads}, {levels}"


def make_level(segments: Sequence[tuple[int, Sequence[int], int]]) -> CascadeLevel:
    """A level from (number of rows, page ids, tokens in the last page) per segment."""
    return CascadeLevel(
        qo_indptr=int_column(accumulate((rows for rows, _, _ in segments), initial=0)),
        kv_page_indptr=int_column(accumulate((len(pages) for _, pages, _ in segments), initial=0)),
        kv_page_indices=int_column(page for _, pages, _ in segments for page in pages),
        kv_last_page_len=int_column(last for _, _, last in segments),
    )


def cascade_case(seed: int, choices: CaseChoices = ANY) -> CascadeCase:
    """A case for every seed: 1 to 4 levels, 1 to 12 sequences, decode, prefill and mixed rows, page sizes 1 to 64."""
    rng = random.Random(seed)
    page_size = _chosen(choices.page_size, rng.choice((1, 2, 4, 16, 64)))
    num_sequences = _chosen(choices.num_sequences, rng.choice((1, 1, 2, 3, 5, 8, 12)))
    num_rows = [1] * num_sequences if choices.decode else _rows(rng, num_sequences)
    kv_lens = [rows + rng.choice((0, 0, rng.randrange(1, 2 * page_size + 40))) for rows in num_rows]
    if choices.identical:
        num_rows, kv_lens = num_rows[:1] * num_sequences, kv_lens[:1] * num_sequences
    pages = _PageSource(rng)

    tables: list[list[int]] = [[] for _ in range(num_sequences)]
    levels, groups = [], [range(num_sequences)]
    for _ in range(_chosen(choices.num_shared_levels, rng.choice((0, 1, 1, 2, 2, 3)))):
        groups = [part for group in groups for part in _split(rng, group)]
        segments = []
        shared_len = rng.choice((1, 2)) if choices.identical else None
        for group in groups:
            shared = pages.take(_chosen(shared_len, rng.choice((0, 0, 1, 2, 1 + 64 // page_size))))
            for sequence in group:
                tables[sequence].extend(shared)
            segments.append((sum(num_rows[i] for i in group), shared, page_size if shared else 0))
        levels.append(make_level(segments))
    leaf = []
    for sequence, kv_len in enumerate(kv_lens):
        own = pages.take(-(-kv_len // page_size))
        tables[sequence].extend(own)
        leaf.append((num_rows[sequence], own, kv_len - (len(own) - 1) * page_size))
    levels.append(make_level(leaf))

    window_len = _window(rng, levels, kv_lens) if choices.window else None
    plan = CascadePlan(tuple(levels), page_size, window_len)
    plan.check(tables)
    heads = choices.heads or (rng.choice((1, 2, 3)), rng.choice((1, 2, 3, 7)), rng.choice((8, 24, 64)))
    return CascadeCase(plan, tables, pages.num_pages, *heads, identical=choices.identical)


def single_level_plan(plan: CascadePlan) -> CascadePlan:
    """The plain way to compute a plan: every sequence reads all its pages by itself."""
    segments = []
    for sequence in range(plan.leaf.num_segments):
        met = plan.page_table(sequence)
        segments.append((len(plan.leaf.rows(sequence)), met, plan.leaf.kv_last_page_len[sequence]))
    single = CascadePlan((make_level(segments),), plan.page_size, plan.window_len)
    single.check([pages for _, pages, _ in segments])
    return single


def pool_with_only(
    case: CascadeCase,
    *,
    num_layers: int,
    dtype: torch.dtype,
    seed: int,
    layout: KVLayout = "NHD",
    device: torch.device | str = "cpu",
    scales: Sequence[KVScale] | None = None,
) -> PagedKVCache:
    """A pool with random K/V in the slots that the case may read and NaN in all others.

    Where the case says `identical`, a token's K/V are a function of its position in its sequence alone.
    """
    kv_cache = PagedKVCache(
        num_layers=num_layers,
        num_pages=case.num_pages,
        page_size=case.plan.page_size,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=dtype,
        device=device,
        layout=layout,
        scales=scales,
    )
    generator = torch.Generator().manual_seed(seed)
    places = sorted(_readable_slots(case).items())
    slots = torch.tensor([slot for slot, _ in places], device=device)
    for layer in range(num_layers):
        # what has scales of its own is NaN by these; torch fills no 8-bit floats on every device
        own_scales = kv_cache.vector_scales(layer)
        (kv_cache.layer(layer) if own_scales is None else own_scales).copy_(torch.tensor(torch.nan))
        k, v = torch.randn(2, len(slots), case.num_kv_heads, case.head_dim, generator=generator).to(device)
        if case.identical:
            k, v = (x[[place for _, place in places]] for x in (k, v))
        kv_cache.write(layer, k, v, slots)
    return kv_cache


def _chosen(choice: int | None, drawn: int) -> int:
    return drawn if choice is None else choice


def _readable_slots(case: CascadeCase) -> dict[int, int]:
    """Every slot that some row may read, and which token of its sequence lies there."""
    plan, slots = case.plan, dict[int, int]()
    for sequence, table in enumerate(case.page_tables):
        kv_len = (len(table) - 1) * plan.page_size + plan.leaf.kv_last_page_len[sequence]
        for token in range(kv_len):
            slots[table[token // plan.page_size] * plan.page_size + token % plan.page_size] = token
    return slots


def _rows(rng: random.Random, num_sequences: int) -> list[int]:
    """New tokens of each sequence: a decode step, equal prefills, or a mixed step."""
    kind = rng.choice(("decode", "decode", "equal", "mixed"))
    if kind == "decode":
        return [1] * num_sequences
    if kind == "equal":
        return [rng.randrange(2, 20)] * num_sequences
    return [rng.choice((1, 1, rng.randrange(2, 50))) for _ in range(num_sequences)]


def _window(rng: random.Random, levels: Sequence[CascadeLevel], kv_lens: Sequence[int]) -> int | None:
    """A sliding window, now and then, where nothing is shared: a shared segment must lie inside every row's window."""
    shares = any(len(level.kv_page_indices) for level in levels[:-1])
    return None if shares or rng.random() < 0.6 else rng.randrange(1, max(kv_lens) + 2)


def _split(rng: random.Random, group: range) -> list[range]:
    """A group of neighbours, cut at random places; not at all one time in three."""
    cuts = [] if rng.random() < 0.3 else [i for i in group[1:] if rng.random() < 0.3]
    bounds = [group.start, *cuts, group.stop]
    return [range(a, b) for a, b in pairwise(bounds)]


class _PageSource:
    """Page ids, each given once: in runs, or scattered over the pool."""

    def __init__(self, rng: random.Random) -> None:
        self._rng, self._next = rng, 0
        self._scattered = rng.random() < 0.6
        self._held: list[int] = []

    @property
    def num_pages(self) -> int:
        return self._next + 1

    def take(self, count: int) -> list[int]:
        if not self._scattered:
            self._next += 1  # a gap, so that runs of different owners do not join
            start, self._next = self._next, self._next + count
            return list(range(start, start + count))
        self._held.extend(range(self._next, self._next + 2 * count + 1))
        self._next += 2 * count + 1
        self._rng.shuffle(self._held)
        taken, self._held = self._held[:count], self._held[count:]
        return taken
