"""What each sequence shared: its part of what steps read and saved, added up once per change of membership.

Shared levels are the same from one decode step to the next, so a sequence saves the same at each of them, and what it
would read alone grows by a token. A run of such steps is therefore only counted, and worked out when it ends or
somebody wants to know.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence as List
from dataclasses import dataclass, replace
from itertools import pairwise

from cascade_llm.plan import CascadePlan, StepPlan
from cascade_llm.scheduler.sequence import Sequence, SequenceSharing
from cascade_llm.scheduler.step import InFlightStep

__all__ = ["SharingLedger"]


@dataclass(slots=True)
class _Share:
    """What one sequence reads in one step, over the attention kinds by their layers."""

    read: float = 0.0
    """Tokens of K/V; of a segment that g sequences read together, a g-th."""
    saved: float = 0.0
    """The rest of these segments."""
    num_levels: int = 1
    group_size: int = 1


@dataclass(slots=True)
class _Run:
    """Steps of the same sequences, one behind the other."""

    sequences: List[Sequence]
    first: StepPlan
    num_steps: int = 1
    num_settled: int = 0


class SharingLedger:
    """Counts steps when they are planned; `settle` adds them to the sequences."""

    def __init__(self) -> None:
        self._run: _Run | None = None

    def count(self, step: InFlightStep) -> None:
        """A step was planned: one of its predecessor's sequences, known by their list, or another."""
        if self._run is not None and step.sequences is self._run.sequences:
            self._run.num_steps += 1
            return
        self.settle()
        self._run = _Run(step.sequences, step.plan)

    def settle(self) -> None:
        """Add to each sequence what it read and saved so far."""
        run = self._run
        if run is None or run.num_steps == run.num_settled:
            return
        num_new = run.num_steps - run.num_settled
        growth = num_new * (run.num_settled + run.num_steps - 1) // 2  # a leaf gains a token with each step
        for sequence, share in zip(run.sequences, _shares(run.first), strict=True):
            before = sequence.sharing
            sequence.sharing = replace(
                before,
                num_steps=before.num_steps + num_new,
                num_shared_steps=before.num_shared_steps + (num_new if share.group_size > 1 else 0),
                num_levels=max(before.num_levels, share.num_levels),
                group_size=max(before.group_size, share.group_size),
                kv_tokens_read=before.kv_tokens_read + num_new * share.read + growth,
                kv_tokens_saved=before.kv_tokens_saved + num_new * share.saved,
            )
        run.num_settled = run.num_steps

    def of(self, sequence: Sequence) -> SequenceSharing:
        """All that a sequence shared, up to the last step that was planned."""
        self.settle()
        return sequence.sharing


def _shares(plan: StepPlan) -> list[_Share]:
    """The share of each leaf segment."""
    shares = [_Share() for _ in range(plan.num_sequences)]
    num_layers = Counter(plan.layer_kinds or (0,))
    for kind, cascade in enumerate(plan.cascades):
        _add_kind(shares, cascade, num_layers[kind] / num_layers.total())
    return shares


def _add_kind(shares: list[_Share], cascade: CascadePlan, weight: float) -> None:
    leaf, size = cascade.leaf, cascade.page_size
    starts, num_levels = leaf.qo_indptr.tolist(), [1] * len(shares)
    for i, (first_page, end_page) in enumerate(pairwise(leaf.kv_page_indptr.tolist())):
        shares[i].read += weight * ((end_page - first_page - 1) * size + leaf.kv_last_page_len[i])
    for level in cascade.shared_levels:
        for segment, (first_row, last_row) in enumerate(pairwise(level.qo_indptr.tolist())):
            num_tokens = level.kv_len(segment, size)
            if not num_tokens:
                continue
            members = range(bisect_left(starts, first_row), bisect_left(starts, last_row))
            read = num_tokens / len(members)
            for i in members:
                share = shares[i]
                share.read += weight * read
                share.saved += weight * (num_tokens - read)
                if len(members) > 1:
                    num_levels[i] += 1
                    share.group_size = max(share.group_size, len(members))
    for share, own in zip(shares, num_levels, strict=True):
        share.num_levels = max(share.num_levels, own)
