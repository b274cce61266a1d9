"""Counters that say what the engine did; `LLM.stats()` is made of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cascade_llm.plan import CascadeReport

__all__ = ["PageCounts", "SchedulerCounters"]


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the engine started. Rows are counted when their step is planned, tokens when it is committed."""

    steps: int = 0
    cascade_steps: int = 0
    """Steps that had at least one shared level."""
    requests: int = 0
    prompt_tokens: int = 0
    """Tokens of all prompts, once per request."""
    prefilled_tokens: int = 0
    """Rows computed for tokens that were known: prompts, and what preempted sequences had generated."""
    recomputed_tokens: int = 0
    """The part of them that had been computed before a preemption."""
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache, or filled by another request of the same step."""
    generated_tokens: int = 0
    drafted_tokens: int = 0
    """Proposed tokens that steps had rows for."""
    accepted_tokens: int = 0
    """The part of them that the model drew itself."""
    copied_pages: int = 0
    """Pages copied inside the device's pool before a sequence wrote to them."""
    moved_pages: int = 0
    """Pages copied from one tier to another."""
    preemptions: int = 0
    finished_requests: int = 0
    kv_tokens_read: int = 0
    """Tokens of K/V that steps read, each segment once."""
    kv_tokens_saved: int = 0
    """What one-level plans of the same steps would have read beside."""
    grouped_rows: int = 0
    shared_groups: int = 0
    last_report: CascadeReport | None = None
    """Of the step planned last."""
    unshared_steps: Counter[str] = field(default_factory=Counter)
    """Steps by the reason why they shared nothing; the reasons are few."""

    def count_rows(self, start: int, end: int, prompt_len: int, computed_len: int) -> None:
        """Add the rows `start` to `end` of a sequence, of which the first `computed_len` had been computed before."""
        self.recomputed_tokens += max(0, min(end, computed_len) - start)
        self.prefilled_tokens += max(0, min(end, max(prompt_len, computed_len)) - start)

    def count_step(self, report: CascadeReport) -> None:
        """Add one planned step."""
        self.steps += 1
        self.cascade_steps += report.num_levels > 1
        self.kv_tokens_read += report.kv_tokens_read
        self.kv_tokens_saved += report.kv_tokens_saved
        self.grouped_rows += report.grouped_rows
        self.shared_groups += report.num_groups
        self.last_report = report
        if report.reason is not None:
            self.unshared_steps[report.reason] += 1

    def sharing(self) -> dict[str, Any]:
        """{"last_step": report or None, "unshared_steps": {reason: steps}}, the commonest reason first."""
        report = self.last_report
        last = None if report is None else {**asdict(report), "kv_tokens_saved": report.kv_tokens_saved}
        return {"last_step": last, "unshared_steps": dict(self.unshared_steps.most_common())}

    def as_dict(self, kv_bytes_per_token: int) -> dict[str, int]:
        """All counters, K/V in bytes over all layers."""
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        counts["kv_bytes_read"] = counts.pop("kv_tokens_read") * kv_bytes_per_token
        counts["kv_bytes_saved"] = counts.pop("kv_tokens_saved") * kv_bytes_per_token
        return counts


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Where the pages of the pool are: free + held + cached = total."""

    total_pages: int
    free_pages: int
    held_pages: int
    """Referenced by a live sequence, or held by a session."""
    cached_pages: int
    """In the prefix tree, held by none: evicted when room is needed."""
    session_pages: int = 0
    """Of the held ones those that sessions hold, alone or beside sequences."""
