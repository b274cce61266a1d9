"""What the last step shared, as a tree of lengths: read off its plan in the engine process, when somebody asks.

Beside it stands what the prefix cache holds, see `cache_view`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from cascade_llm.plan import CascadePlan, StepPlan
from cascade_llm.scheduler.sequence import SequenceStatus
from cascade_llm.server.cache_view import MOST_SHOWN_TOKENS, cached_runs

if TYPE_CHECKING:  # heavy
    from cascade_llm.engine.engine import StepEvent
    from cascade_llm.llm import LLM

__all__ = ["SharedRun", "SharingView", "shared_runs"]

COUNTERS = (
    *("running_sequences", "waiting_sequences", "steps", "cascade_steps", "generated_tokens", "cached_tokens"),
    *("kv_bytes_read", "kv_bytes_saved"),
)
"""What is told of `LLM.stats()`."""


class SharedRun(NamedTuple):
    """Tokens of K/V that a step reads once for several sequences."""

    level: int
    start_len: int
    """Tokens before it that are shared too."""
    num_tokens: int
    num_sequences: int
    sequence: int
    """The leaf segment of one of them."""
    runs: list[SharedRun]
    """Inside: of some of its sequences."""
    own_lens: list[int]
    """Tokens that the others of its sequences have to themselves."""


def shared_runs(plan: CascadePlan, among: Container[int] | None = None) -> tuple[list[SharedRun], list[int]]:
    """The outermost shared runs of a plan, and the lengths of the sequences that share nothing.

    `among`: the leaf segments whose sequences are told of; None is all.
    """
    firsts = {row: sequence for sequence, row in enumerate(plan.leaf.qo_indptr[:-1])}
    segments = [
        {
            level.qo_indptr[i]: (level.qo_indptr[i + 1], level.kv_len(i, plan.page_size))
            for i in range(level.num_segments)
        }
        for level in plan.levels
    ]

    def inside(depth: int, row: int, end: int, start_len: int) -> tuple[list[SharedRun], list[int]]:
        runs: list[SharedRun] = []
        own_lens: list[int] = []
        while row < end:
            first, (row, num_tokens) = row, segments[depth][row]
            if depth == len(segments) - 1:
                if among is None or firsts[first] in among:
                    own_lens.append(num_tokens)
                continue
            inner, lens = inside(depth + 1, first, row, start_len + num_tokens)
            num_sequences = len(lens) + sum(run.num_sequences for run in inner)
            if num_sequences == 0:
                continue
            if num_sequences == 1 or num_tokens == 0:
                runs += inner
                own_lens += [num_tokens + length for length in lens]
            else:
                runs.append(SharedRun(depth, start_len, num_tokens, num_sequences, firsts[first], inner, lens))
        return runs, own_lens

    return inside(0, 0, plan.num_rows, 0)


class _Kind(NamedTuple):
    """What the layers of one attention kind share in a step."""

    window_len: int | None
    num_layers: int
    width: int
    """Bytes of K and V of a token, in these layers."""
    runs: list[SharedRun]
    own_lens: list[int]

    def as_dict(self, tokens: Mapping[int, list[int]]) -> dict[str, Any]:
        """`tokens`: all of those leaf segments whose shared runs are told as token ids. Where in a sequence a windowed
        kind shares is not in a plan, so there lengths are all that is told."""
        shown = tokens if self.window_len is None else {}
        runs = [self._run_as_dict(run, shown) for run in self.runs]
        return {"window_len": self.window_len, "num_layers": self.num_layers, "runs": runs, "own_lens": self.own_lens}

    def _run_as_dict(self, run: SharedRun, tokens: Mapping[int, list[int]]) -> dict[str, Any]:
        described: dict[str, Any] = {
            "level": run.level,
            "start_len": run.start_len,
            "num_tokens": run.num_tokens,
            "num_sequences": run.num_sequences,
            "kv_bytes_saved": self.width * run.num_tokens * (run.num_sequences - 1),
            "runs": [self._run_as_dict(inner, tokens) for inner in run.runs],
            "own_lens": run.own_lens,
        }
        if run.sequence in tokens:
            end = run.start_len + min(run.num_tokens, MOST_SHOWN_TOKENS)
            described["token_ids"] = tokens[run.sequence][run.start_len : end]
        return described


class SharingView:
    """Remembers the last plan: all that a step costs where nobody asks."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._plan: StepPlan | None = None
        llm.engine.on_step.append(self._note)

    def _note(self, event: StepEvent) -> None:
        self._plan = event.plan

    def describe(self, tenant: str | None = None, *, with_tokens: bool) -> dict[str, Any]:
        """Counters, pools, the prefix cache and the last step; for the loop, between two steps.

        Args:
            tenant: whose sequences are told of, as long as they run, and nothing else; None is all
            with_tokens: say how each shared run begins, as token ids; else there are only lengths
        """
        if tenant is not None:
            return self._of_tenant(tenant, with_tokens)
        stats, pools = self._llm.stats(), self._llm.engine.scheduler.pools
        return {
            **{name: stats[name] for name in COUNTERS},
            "pools": [{"window_len": window_len, **asdict(counts)} for window_len, counts in pools],
            "cache": self._cache(None, with_tokens),
            "last_step": None if self._plan is None else self._step(self._plan, with_tokens),
        }

    def _cache(self, tenant: str | None, with_tokens: bool) -> dict[str, Any]:
        return cached_runs(self._llm.engine.scheduler.prefix_tree, tenant, with_tokens=with_tokens)

    def _of_tenant(self, tenant: str, with_tokens: bool) -> dict[str, Any]:
        own = [s for s in self._llm.engine.scheduler.sequences() if s.request.client.tenant == tenant]
        running = {(s.lane, s.epoch) for s in own if s.status is SequenceStatus.RUNNING}
        plan, last_step = self._plan, None
        if plan is not None:
            uses = zip(plan.sequence_lanes, plan.sequence_epochs, strict=True)
            among = {segment for segment, use in enumerate(uses) if use in running}
            last_step = self._part(plan, among, with_tokens) if among else None
        counts = {"running_sequences": len(running), "waiting_sequences": len(own) - len(running)}
        return {**counts, "cache": self._cache(tenant, with_tokens), "last_step": last_step}

    def _part(self, plan: StepPlan, among: set[int], with_tokens: bool) -> dict[str, Any]:
        """As `_step` says it, of some sequences: what they read and save as if they were alone."""
        kinds, tokens = self._kinds(plan, among), self._tokens(plan) if with_tokens else {}
        runs = [run for kind in kinds for run in kind.runs]
        return {
            "step_id": plan.step_id,
            "num_sequences": len(among),
            "num_levels": 1 + max(map(_depth, runs), default=0),
            "num_groups": sum(map(_num_runs, kinds[0].runs)),
            "kv_bytes_read": sum(kind.width * (sum(kind.own_lens) + _tokens_read(kind.runs)) for kind in kinds),
            "kv_bytes_saved": sum(kind.width * _tokens_saved(kind.runs) for kind in kinds),
            "reason": None if runs else "no prefix of these requests is read together",
            "kinds": [kind.as_dict(tokens) for kind in kinds],
        }

    def _step(self, plan: StepPlan, with_tokens: bool) -> dict[str, Any]:
        report, width = plan.report, self._llm.facts.kv_bytes_per_token
        tokens = self._tokens(plan) if with_tokens else {}
        return {
            "step_id": plan.step_id,
            "num_sequences": plan.num_sequences,
            "num_levels": report.num_levels,
            "num_groups": report.num_groups,
            "kv_bytes_read": report.kv_tokens_read * width,
            "kv_bytes_saved": report.kv_tokens_saved * width,
            "reason": report.reason,
            "kinds": [kind.as_dict(tokens) for kind in self._kinds(plan)],
        }

    def _kinds(self, plan: StepPlan, among: Container[int] | None = None) -> list[_Kind]:
        facts = self._llm.facts
        num_layers = Counter(plan.layer_kinds) if plan.layer_kinds else {0: facts.model.num_layers}
        return [
            _Kind(
                cascade.window_len,
                num_layers[kind],
                facts.model.kv_bytes_of_layers(num_layers[kind], facts.attention.kv_number_bytes),
                *shared_runs(cascade, among),
            )
            for kind, cascade in enumerate(plan.cascades)
        ]

    def _tokens(self, plan: StepPlan) -> Mapping[int, list[int]]:
        """Of the leaf segments whose sequences still run, all tokens."""
        lanes = {(s.lane, s.epoch): s.token_ids for s in self._llm.engine.scheduler.sequences()}
        uses = zip(plan.sequence_lanes, plan.sequence_epochs, strict=True)
        return {segment: list(lanes[use]) for segment, use in enumerate(uses) if use in lanes}


def _depth(run: SharedRun) -> int:
    return 1 + max(map(_depth, run.runs), default=0)


def _num_runs(run: SharedRun) -> int:
    return 1 + sum(map(_num_runs, run.runs))


def _tokens_read(runs: Iterable[SharedRun]) -> int:
    return sum(run.num_tokens + sum(run.own_lens) + _tokens_read(run.runs) for run in runs)


def _tokens_saved(runs: Iterable[SharedRun]) -> int:
    return sum(run.num_tokens * (run.num_sequences - 1) + _tokens_saved(run.runs) for run in runs)
