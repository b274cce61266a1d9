"""The contract between scheduler and runner: what one step computes, and what came of it.

A `StepPlan` is everything that a device needs for one step: rows (query tokens), where their tokens come from, where
their K/V go, which of them are sampled, and one `CascadePlan` per attention kind. A `StepResult` comes back. Neither
side sees anything else of the other.

A `CascadePlan` is a tuple of levels, coarsest first. Each `CascadeLevel` is four int columns in FlashInfer's own words
(`MultiLevelCascadeAttentionWrapper.plan`): segment i joins the rows `qo_indptr[i]:qo_indptr[i+1]` with the pages
`kv_page_indices[kv_page_indptr[i]:kv_page_indptr[i+1]]`, the last of which holds `kv_last_page_len[i]` tokens. The
last level has one segment per sequence. Six invariants hold:

1. Partition: at every level the segments cover all rows, in order, without gaps. A row with nothing to share sits in
   an empty segment (no pages, `kv_last_page_len` 0).
2. Refinement: a level's boundaries are boundaries of the next.
3. Exactness: the pages a row meets from root to leaf are those its attention kind may read, each once, in order.
4. Fullness: a shared segment holds full pages only, or nothing.
5. Causality: a leaf segment holds at least its sequence's new tokens, so masking the leaf alone is right.
6. Write before read: in each layer every row's K/V is written before any segment is read. So a segment may hold pages
   that another sequence fills in this very step.

A level that did not change since the last step is the same object, so that what was derived from it can be kept.

A kind with a window reads the last `window_len` tokens before and at each row. A segment is shared only where it lies
inside the window of every row in it; pages that no row's window reaches need not be read. What a sequence meets is one
stretch that ends at its last token: first pages of its leaf, then the shared ones, then the rest of its leaf. So the
window masks the leaf alone. It is counted from the leaf's end, and shorter there by the tokens that are shared
(`CascadePlan.leaf_window_lens`).
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice, pairwise
from typing import NamedTuple

from cascade_llm.errors import PlanError
from cascade_llm.outputs import TokenLogprob
from cascade_llm.sampling_params import SamplingParams

__all__ = [
    "CascadeLevel",
    "CascadePlan",
    "CascadeReport",
    "IntColumn",
    "LaneStart",
    "PageCopy",
    "StepPlan",
    "StepResult",
    "Tier",
    "int_column",
]

IntColumn = memoryview
"""A read-only view (format "i") over an `array("i")`; `.obj` is the array, which torch reads without a copy."""


def int_column(values: Iterable[int]) -> IntColumn:
    """A read-only int32 column; an `array("i")` is taken over, not copied."""
    owned = values if isinstance(values, array) else array("i", values)
    if owned.typecode != "i":
        raise PlanError(f"a column must be int32 (array typecode 'i'), not {owned.typecode!r}")
    return memoryview(owned).toreadonly()


def _check_column(name: str, column: object) -> None:
    if not isinstance(column, memoryview) or column.format != "i" or not column.readonly:
        raise PlanError(f"{name} must be a read-only int32 view, see plan.int_column")


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class CascadeLevel:
    """One level: every row of the step is in exactly one of its segments. Immutable; compared by identity."""

    qo_indptr: IntColumn
    """[num_segments + 1], rows"""
    kv_page_indptr: IntColumn
    """[num_segments + 1], entries of `kv_page_indices`"""
    kv_page_indices: IntColumn
    """[num_page_entries], page ids"""
    kv_last_page_len: IntColumn
    """[num_segments], tokens in the last page; 0 where the segment is empty"""

    @property
    def num_segments(self) -> int:
        """Segments, the empty ones counted."""
        return len(self.qo_indptr) - 1

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return int(self.qo_indptr[-1])

    def rows(self, segment: int) -> range:
        """The rows of a segment."""
        return range(self.qo_indptr[segment], self.qo_indptr[segment + 1])

    def pages(self, segment: int) -> IntColumn:
        """The page ids of a segment, in order."""
        return self.kv_page_indices[self.kv_page_indptr[segment] : self.kv_page_indptr[segment + 1]]

    def kv_len(self, segment: int, page_size: int) -> int:
        """Tokens of K/V in a segment."""
        num_pages = self.kv_page_indptr[segment + 1] - self.kv_page_indptr[segment]
        return int((num_pages - 1) * page_size + self.kv_last_page_len[segment]) if num_pages else 0

    def check(self, page_size: int) -> None:
        """Raise `PlanError` unless the four columns fit each other."""
        for name in ("qo_indptr", "kv_page_indptr", "kv_page_indices", "kv_last_page_len"):
            _check_column(name, getattr(self, name))
        for name, indptr in (("qo_indptr", self.qo_indptr), ("kv_page_indptr", self.kv_page_indptr)):
            if not len(indptr) or indptr[0] != 0:
                raise PlanError(f"{name} must start with 0")
            if any(a > b for a, b in pairwise(indptr)):
                raise PlanError(f"{name} must not decrease")
        if len(self.kv_page_indptr) != len(self.qo_indptr) or len(self.kv_last_page_len) != self.num_segments:
            raise PlanError("qo_indptr, kv_page_indptr and kv_last_page_len must describe the same segments")
        if self.kv_page_indptr[-1] != len(self.kv_page_indices):
            raise PlanError("kv_page_indptr must end at the length of kv_page_indices")
        if any(page < 0 for page in self.kv_page_indices):
            raise PlanError("kv_page_indices has a negative page id")
        for segment, last in enumerate(self.kv_last_page_len):
            empty = self.kv_page_indptr[segment] == self.kv_page_indptr[segment + 1]
            if (last != 0) if empty else not 1 <= last <= page_size:
                raise PlanError(f"segment {segment}: kv_last_page_len {last} does not fit its pages")


@dataclass(frozen=True, eq=False, slots=True, weakref_slot=True)
class CascadePlan:
    """What each row of a step attends to, level by level; for one attention kind."""

    levels: tuple[CascadeLevel, ...]
    """Coarsest first; the last is the leaf: one segment per sequence, the only one with a causal mask."""
    page_size: int
    """Tokens per page."""
    window_len: int | None = None
    """The attention kind: None reads all earlier tokens, a number the last so many, the row's own counted."""

    @property
    def leaf(self) -> CascadeLevel:
        """The last level: one segment per sequence."""
        return self.levels[-1]

    @property
    def shared_levels(self) -> tuple[CascadeLevel, ...]:
        """All levels but the leaf."""
        return self.levels[:-1]

    @property
    def num_rows(self) -> int:
        """Rows of the step."""
        return self.leaf.num_rows

    def paths(self) -> Iterator[tuple[int, ...]]:
        """For each leaf segment, the segment of every level that its rows sit in, root to leaf."""
        cursors = [0] * len(self.levels)
        for row in self.leaf.qo_indptr[:-1]:
            for depth, level in enumerate(self.levels):
                while level.qo_indptr[cursors[depth] + 1] <= row:
                    cursors[depth] += 1
            yield tuple(cursors)

    def path_len(self, path: Sequence[int]) -> int:
        """Tokens on one of `paths()`, the sequence's new ones counted."""
        return sum(level.kv_len(segment, self.page_size) for level, segment in zip(self.levels, path, strict=True))

    def leaf_window_lens(self) -> list[int] | None:
        """For each leaf segment how many of its last tokens its rows may read, counted from the row's own; None where
        a row reads all earlier ones. What a sequence shares lies inside its window and is no part of the leaf."""
        if self.window_len is None:
            return None
        if len(self.levels) == 1:
            return [self.window_len] * self.leaf.num_segments
        return [self.window_len - self._shared_len(path) for path in self.paths()]

    def _shared_len(self, path: Sequence[int]) -> int:
        """Tokens of the shared segments on one of `paths()`."""
        zipped = zip(self.shared_levels, path, strict=False)
        return sum(level.kv_len(segment, self.page_size) for level, segment in zipped)

    def page_table(self, sequence: int) -> list[int]:
        """All pages that the rows of one leaf segment meet, in an order in which one causal mask, and the window
        counted from the end, say what each row reads. Slow; for checks and twins."""
        path = next(islice(self.paths(), sequence, None))
        zipped = zip(self.shared_levels, path, strict=False)
        shared = [page for level, segment in zipped for page in level.pages(segment)]
        own, num_cut = self.leaf.pages(sequence).tolist(), 0
        if self.window_len is not None:
            num_hidden = self.path_len(path) - self.window_len
            num_cut = max(0, -(-num_hidden // self.page_size)) if shared else 0
        return [*own[:num_cut], *shared, *own[num_cut:]]

    def check(self, page_tables: Sequence[Sequence[int]] | None = None) -> None:
        """Raise `PlanError` unless invariants 1-5 hold.

        `page_tables`: all pages of each leaf segment's sequence, for a full check of exactness, whose end alone a
        kind with a window has to meet; without them only repeated pages are found, and too many shared ones.
        """
        if self.page_size < 1:
            raise PlanError(f"page_size is {self.page_size}: it must be 1 or larger")
        if not self.levels:
            raise PlanError("a plan needs at least the leaf level")
        boundaries: set[int] = {0}
        for depth, level in enumerate(self.levels):
            try:
                level.check(self.page_size)
                if level.num_rows != self.levels[0].num_rows:
                    raise PlanError(f"covers {level.num_rows} rows, level 0 {self.levels[0].num_rows} (partition)")
                own = set(level.qo_indptr)
                if not boundaries <= own:
                    raise PlanError(f"row {min(boundaries - own)} ends a segment above but not here (refinement)")
                boundaries = own
                if depth < len(self.levels) - 1:
                    self._check_shared(level)
            except PlanError as error:
                raise PlanError(f"level {depth}: {error}") from None
        self._check_leaf()
        self._check_exactness(page_tables)

    def _check_shared(self, level: CascadeLevel) -> None:
        for segment, last in enumerate(level.kv_last_page_len):
            if not level.rows(segment):
                raise PlanError(f"segment {segment} has no rows: spare capacity is the runner's (partition)")
            if last not in (0, self.page_size):
                raise PlanError(f"segment {segment}: its last page holds {last} tokens, not full (fullness)")

    def _check_leaf(self) -> None:
        for sequence in range(self.leaf.num_segments):
            num_new, kv_len = len(self.leaf.rows(sequence)), self.leaf.kv_len(sequence, self.page_size)
            if num_new == 0:
                raise PlanError(f"leaf segment {sequence} has no rows")
            if kv_len < num_new:
                raise PlanError(f"leaf segment {sequence} holds {kv_len} tokens for {num_new} new ones (causality)")

    def _check_exactness(self, page_tables: Sequence[Sequence[int]] | None) -> None:
        if page_tables is not None and len(page_tables) != self.leaf.num_segments:
            raise PlanError(f"{len(page_tables)} page tables for {self.leaf.num_segments} sequences (exactness)")
        for sequence, path in enumerate(self.paths()):
            own = self.leaf.pages(sequence).tolist()
            zipped = zip(self.shared_levels, path, strict=False)
            shared = [page for level, segment in zipped for page in level.pages(segment)]
            if len({*shared, *own}) != len(shared) + len(own):
                raise PlanError(f"sequence {sequence} meets a page twice (exactness)")
            if shared and self.window_len is not None:
                room = self.window_len - len(self.leaf.rows(sequence))
                if len(shared) * self.page_size > room:
                    raise PlanError(f"sequence {sequence} shares pages outside its window of {self.window_len}")
            if page_tables is not None:
                self._check_pages(sequence, shared, own, list(page_tables[sequence]))

    def _check_pages(self, sequence: int, shared: list[int], own: list[int], table: list[int]) -> None:
        """What a sequence meets is its table, or in a kind with a window the table's end."""
        first = 0 if self.window_len is None else max(0, len(table) - len(shared) - len(own))
        start = table.index(shared[0], first) - first if shared and shared[0] in table[first:] else 0
        if [*own[:start], *shared, *own[start:]] != table[first:] or (start and self.window_len is None):
            raise PlanError(f"sequence {sequence} meets pages {[*shared, *own]}, its own are {table}")
        end = (len(table) - 1) * self.page_size + self.leaf.kv_last_page_len[sequence]
        if shared and self.window_len is not None and (first + start) * self.page_size < end - self.window_len:
            raise PlanError(f"sequence {sequence} shares pages outside its window of {self.window_len} (exactness)")


class Tier(IntEnum):
    """Where a page lies; each tier has page ids of its own."""

    DEVICE = 0
    HOST = 1
    DISK = 2
    REMOTE = 3


class PageCopy(NamedTuple):
    """A page to copy in every layer of its pool, before the step's first write; all sources are read before a target is
    written."""

    source: int
    """Page id in the source's tier."""
    target: int
    source_tier: Tier = Tier.DEVICE
    target_tier: Tier = Tier.DEVICE
    pool: int = 0
    """The kind in whose layers it is copied, where kinds have pools of their own (`StepPlan.window_slots`)."""


@dataclass(frozen=True, slots=True)
class LaneStart:
    """A sequence enters a lane; the lane's device state is set from this before the step's rows are read."""

    lane: int
    epoch: int
    """Grows with each use of a lane: rows of an earlier use are told apart by it."""
    params: SamplingParams
    seed: int
    sample_index: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    """Generated before a preemption; else empty."""
    ending_token_ids: frozenset[int]
    """What the min_tokens mask hides: the model's ending ids (unless ignored) and the request's stop ids."""


@dataclass(frozen=True, slots=True)
class CascadeReport:
    """What a step's plan shares, or why it shares nothing; groups are those of the kind that reads most."""

    num_levels: int = 1
    """Levels of the plan, the leaf counted."""
    num_groups: int = 0
    """Segments that hold pages of several sequences; one that holds pages of a single sequence does not count."""
    grouped_rows: int = 0
    """Rows in at least one of them."""
    kv_tokens_read: int = 0
    """Tokens of K/V over all segments: of several attention kinds, the mean over the model's layers, rounded down."""
    kv_tokens_one_level: int = 0
    """Tokens of K/V that a one-level plan of the same step reads, counted in the same way."""
    reason: str | None = None
    """Why nothing was shared; None where something was."""

    @property
    def kv_tokens_saved(self) -> int:
        """Tokens of K/V that sharing did not read."""
        return self.kv_tokens_one_level - self.kv_tokens_read


EMPTY = int_column(())


@dataclass(frozen=True, eq=False, slots=True, kw_only=True)
class StepPlan:
    """One step, complete. Columns over rows have one entry per row, in the order of the cascade plan."""

    step_id: int
    cascades: tuple[CascadePlan, ...]
    """One per attention kind of the model, all over the same rows; the kind that reads most first."""
    layer_kinds: tuple[int, ...] = ()
    """[layers] which of `cascades` a layer reads, the same object every step; empty: all layers the first."""
    token_ids: IntColumn
    """[rows] input tokens, proposed ones among them; 0 where the token comes from a lane."""
    positions: IntColumn
    """[rows] position of the token in its sequence, from 0."""
    slots: IntColumn
    """[rows] where the row's K/V are written: page id * page_size + offset."""
    window_slots: tuple[IntColumn, ...] = ()
    """The same for each kind after the first, where each has a pool of its own. Then the page ids of a kind's cascade
    are places in that kind's pool, and what no window reaches has none. Empty: all kinds have their pages in one pool,
    and all write at `slots`."""
    lane_rows: IntColumn = EMPTY
    """[lane inputs] rows whose token is on the device, in its lane."""
    lane_row_lanes: IntColumn = EMPTY
    """[lane inputs] the lanes they come from."""
    sequence_lanes: IntColumn
    """[leaf segments] lane of each scheduled sequence."""
    sequence_epochs: IntColumn
    """[leaf segments] epoch of the lane's present use."""
    sample_rows: IntColumn = EMPTY
    """[samples] rows whose logits are drawn from; n first tokens of one prompt name the same row."""
    sample_lanes: IntColumn = EMPTY
    """[samples] the lane that each drawn token goes to."""
    sample_positions: IntColumn = EMPTY
    """[samples] the position that the drawn token will have in its sequence."""
    sample_mask_rows: IntColumn = EMPTY
    """[samples] entry of `token_bitmasks` that says what may be drawn, or -1 for any token; empty: all -1."""
    token_bitmasks: tuple[IntColumn, ...] = ()
    """Each [ceil(vocab_size / 32)] words: bit i of word w is set where token 32 * w + i is allowed."""
    draft_samples: IntColumn = EMPTY
    """[drafts] the first sample of each sequence with proposed tokens: its last rows hold its last token and these."""
    draft_lens: IntColumn = EMPTY
    """[drafts] proposed tokens; one more than these are the lane's samples, from rows that follow each other."""
    prompt_logprob_rows: IntColumn = EMPTY
    """[prompt logprobs] rows whose logits are reported for the prompt token after them."""
    prompt_logprob_token_ids: IntColumn = EMPTY
    """[prompt logprobs] that prompt token."""
    prompt_logprob_counts: IntColumn = EMPTY
    """[prompt logprobs] how many most probable tokens to report beside it."""
    lane_starts: tuple[LaneStart, ...] = ()
    page_copies: tuple[PageCopy, ...] = ()
    report: CascadeReport = field(default_factory=CascadeReport)

    @property
    def cascade(self) -> CascadePlan:
        """The plan of the kind that reads most."""
        return self.cascades[0]

    def cascade_of(self, layer: int) -> CascadePlan:
        """The plan of a layer's kind."""
        return self.cascades[self.layer_kinds[layer] if self.layer_kinds else 0]

    def slots_of(self, kind: int) -> IntColumn:
        """[rows] where the layers of a kind write."""
        return self.window_slots[kind - 1] if kind and self.window_slots else self.slots

    @property
    def num_rows(self) -> int:
        """Query tokens of this step."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """Scheduled sequences: leaf segments."""
        return len(self.sequence_lanes)

    def check(self, page_tables: Sequence[Sequence[int]] | None = None) -> None:
        """Raise `PlanError` unless the plan is whole: columns, slots, samples, and the invariants of its cascades.

        page_tables: see `CascadePlan.check`; of the kinds that have no pool of their own
        """
        if not self.cascades:
            raise PlanError("a step needs the cascade of an attention kind")
        windows = [cascade.window_len for cascade in self.cascades]
        shorter = all(b is not None and (a is None or b < a) for a, b in pairwise(windows))
        if not shorter or (windows[-1] is not None and windows[-1] < 1):
            raise PlanError(f"the kinds have windows {windows}: each must be shorter than the one before, 1 or more")
        if self.window_slots and len(self.window_slots) != len(self.cascades) - 1:
            raise PlanError(f"{len(self.window_slots)} window_slots for {len(self.cascades)} kinds: the first has none")
        for kind, cascade in enumerate(self.cascades):
            cascade.check(None if kind and self.window_slots else page_tables)
            if cascade.num_rows != self.num_rows:
                raise PlanError(f"the cascade covers {cascade.num_rows} rows, the step has {self.num_rows}")
            if cascade.leaf.num_segments != self.num_sequences:
                raise PlanError(f"{cascade.leaf.num_segments} leaf segments for {self.num_sequences} sequences")
        if any(not 0 <= kind < len(self.cascades) for kind in self.layer_kinds):
            raise PlanError(f"layer_kinds names kinds {sorted(set(self.layer_kinds))}, there are {len(self.cascades)}")
        self._check_columns()
        self._check_masks()
        self._check_lanes(self._check_drafts())
        for kind, cascade in enumerate(self.cascades):
            self._check_slots(cascade, self.slots_of(kind))

    def _check_columns(self) -> None:
        groups = (
            ("rows", ("token_ids", "positions", "slots"), ()),
            ("lane inputs", ("lane_rows", "lane_row_lanes"), ("lane_rows",)),
            ("sequences", ("sequence_lanes", "sequence_epochs"), ()),
            ("samples", ("sample_rows", "sample_lanes", "sample_positions"), ("sample_rows",)),
            ("drafts", ("draft_samples", "draft_lens"), ()),
            (
                "prompt logprobs",
                ("prompt_logprob_rows", "prompt_logprob_token_ids", "prompt_logprob_counts"),
                ("prompt_logprob_rows",),
            ),
        )
        for what, names, row_columns in groups:
            for name in names:
                _check_column(name, getattr(self, name))
            if len({len(getattr(self, name)) for name in names}) > 1:
                raise PlanError(f"columns over {what} differ in length: {', '.join(names)}")
            for name in row_columns:
                if any(not 0 <= row < self.num_rows for row in getattr(self, name)):
                    raise PlanError(f"{name} names a row outside the step")
        for column in self.window_slots:
            _check_column("window_slots", column)
            if len(column) != self.num_rows:
                raise PlanError(f"window_slots has {len(column)} rows, the step {self.num_rows}")
        if any(not 0 <= copy.pool <= len(self.window_slots) for copy in self.page_copies):
            raise PlanError(f"a page copy names a pool, there are {1 + len(self.window_slots)}")
        for row, position in zip(self.sample_rows, self.sample_positions, strict=True):
            if position != self.positions[row] + 1:
                raise PlanError(f"row {row} has position {self.positions[row]}, the token drawn from it {position}")

    def _check_masks(self) -> None:
        for row, words in enumerate(self.token_bitmasks):
            _check_column("token_bitmasks", words)
            if not any(words) or len(words) != len(self.token_bitmasks[0]):
                raise PlanError(f"token_bitmasks row {row} allows no token, or is not as long as the first")
        _check_column("sample_mask_rows", self.sample_mask_rows)
        if self.sample_mask_rows and len(self.sample_mask_rows) != len(self.sample_rows):
            raise PlanError(f"{len(self.sample_mask_rows)} sample_mask_rows for {len(self.sample_rows)} samples")
        if any(not -1 <= row < len(self.token_bitmasks) for row in self.sample_mask_rows):
            raise PlanError("sample_mask_rows names a row outside token_bitmasks")

    def _check_drafts(self) -> set[int]:
        """The samples that are drawn from rows of proposed tokens."""
        proposed: set[int] = set()
        row_ends, on_device = self.cascade.leaf.qo_indptr, set(self.lane_rows)
        for first, length in zip(self.draft_samples, self.draft_lens, strict=True):
            end = first + length + 1
            if length < 1 or not 0 <= first < end <= len(self.sample_rows):
                raise PlanError(f"a draft of {length} tokens from sample {first} on, of {len(self.sample_rows)}")
            start = self.sample_rows[first]
            sequence = bisect_right(row_ends, start) - 1
            if list(self.sample_rows[first:end]) != list(range(start, row_ends[sequence + 1])):
                raise PlanError(f"the draft from sample {first} on is not drawn from its sequence's last rows")
            if set(self.sample_lanes[first:end]) != {self.sequence_lanes[sequence]}:
                raise PlanError(f"the draft from sample {first} on is not drawn for its own lane")
            if not on_device.isdisjoint(range(start + 1, row_ends[sequence + 1])):
                raise PlanError(f"the draft from sample {first} on takes a proposed token from a lane")
            proposed.update(range(first + 1, end))
        return proposed

    def _check_lanes(self, proposed: set[int]) -> None:
        for what, lanes in (
            ("two sequences of a step are in one lane", self.sequence_lanes),
            ("a lane is sampled twice in one step", [n for i, n in enumerate(self.sample_lanes) if i not in proposed]),
            ("two sequences enter one lane", [start.lane for start in self.lane_starts]),
            ("a page is copied to twice", [(copy.target, copy.target_tier, copy.pool) for copy in self.page_copies]),
        ):
            if len(set(lanes)) != len(lanes):
                raise PlanError(what)
        for row, lane in zip(self.lane_rows, self.lane_row_lanes, strict=True):
            own = self.sequence_lanes[bisect_right(self.cascade.leaf.qo_indptr, row) - 1]
            if lane != own:
                raise PlanError(f"row {row} takes its token from lane {lane}, its sequence is in lane {own}")

    def _check_slots(self, cascade: CascadePlan, slots: IntColumn) -> None:
        """Each row writes where its own leaf segment reads it last, at its position, and no slot is written twice."""
        leaf, page_size, window_len = cascade.leaf, cascade.page_size, cascade.window_len
        if len(set(slots)) != self.num_rows:
            raise PlanError("two rows write one slot")
        for sequence, path in enumerate(cascade.paths()):
            rows, pages, met_len = leaf.rows(sequence), leaf.pages(sequence), cascade.path_len(path)
            unread_len = 0 if window_len is None else self.positions[rows[-1]] + 1 - met_len
            if unread_len > 0 and window_len is not None and met_len < window_len + len(rows) - 1:
                raise PlanError(f"sequence {sequence} meets {met_len} tokens, its window reaches further (exactness)")
            shared_len = unread_len + met_len - leaf.kv_len(sequence, page_size)
            for offset, row in enumerate(rows, start=leaf.kv_len(sequence, page_size) - len(rows)):
                if slots[row] != pages[offset // page_size] * page_size + offset % page_size:
                    raise PlanError(f"row {row} writes slot {slots[row]}, outside its place in its leaf segment")
                if unread_len < 0 or self.positions[row] != shared_len + offset:
                    raise PlanError(
                        f"row {row} has position {self.positions[row]}, but meets {shared_len + offset} earlier tokens"
                    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step produced, in the order of the plan's samples."""

    step_id: int
    token_ids: Sequence[int] = ()
    """[samples]; of a draft the first `accepted_counts + 1` mean something"""
    accepted_counts: Sequence[int] = ()
    """[drafts] proposed tokens that the model drew itself, up to the first that it did not"""
    logprobs: Sequence[TokenLogprob | None] = ()
    """[samples]; empty where no sequence of the step asked."""
    prompt_logprobs: Sequence[TokenLogprob] = ()
    """[prompt logprobs]"""
    failed_samples: frozenset[int] = frozenset()
    """Samples whose logits were not finite; their token means nothing."""
    failure_detail: str | None = None
    """With `debug=True`: the first layer whose output was not finite."""

    def check(self, plan: StepPlan) -> None:
        """Raise `PlanError` unless this answers the plan: its step, and one entry per sample and prompt logprob."""
        if self.step_id != plan.step_id:
            raise PlanError(f"a result of step {self.step_id} for the plan of step {plan.step_id}")
        num_samples, num_prompt_logprobs = len(plan.sample_rows), len(plan.prompt_logprob_rows)
        for what, found, expected in (
            ("token_ids", len(self.token_ids), num_samples),
            ("logprobs", len(self.logprobs) or num_samples, num_samples),
            ("prompt_logprobs", len(self.prompt_logprobs), num_prompt_logprobs),
            ("accepted_counts", len(self.accepted_counts), len(plan.draft_lens)),
        ):
            if found != expected:
                raise PlanError(f"{found} {what} for a plan that asks for {expected}")
        if any(not 0 <= n <= length for n, length in zip(self.accepted_counts, plan.draft_lens, strict=True)):
            raise PlanError(f"accepted_counts {list(self.accepted_counts)} for drafts of {plan.draft_lens.tolist()}")
        if not self.failed_samples <= set(range(num_samples)):
            raise PlanError(f"failed_samples {sorted(self.failed_samples)} for {num_samples} samples")
