"""The sampling graphs: which there are, how a step's samples go through one, what comes back.

For each number of rows there are four that choose tokens, each doing more than the one before, and one that reports
log-probabilities. Three that most loads need are captured at the start; that with penalties and lists, and reports, at
the first step of so many rows that needs them, between steps.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from cascade_llm.device.ranks import Ranks
from cascade_llm.device.start_errors import is_out_of_memory
from cascade_llm.device.stream import DeviceStream, Graph
from cascade_llm.plan import IntColumn, StepPlan, StepResult
from cascade_llm.sampling.lanes import LaneState, Needs
from cascade_llm.sampling.logprobs import read_report, report
from cascade_llm.sampling.sampler import Sampler, choose
from cascade_llm.worker.step_buffers import HostBuffers, StepBuffers

__all__ = ["CHOICES", "GraphCounters", "SamplingGraphs", "report_len"]

log = logging.getLogger("cascade_llm")

CHOICES = (
    Needs.NOTHING,
    Needs.DRAW,
    Needs.DRAW | Needs.FILTER,
    Needs.DRAW | Needs.FILTER | Needs.ADJUST,
)
"""What the graphs that choose tokens do; a step takes the first that does all it needs."""
CAPTURED_AT_START = tuple(reversed(CHOICES[:-1]))
CAPTURED_LATER = (CHOICES[-1], Needs.REPORT)
LOGPROBS_CAPACITY = 20
NO_MEMORY = "no memory for its sampling graph"


def report_len(vocab_size: int) -> int:
    """Numbers that come back for each row: the chosen token's, and those of the most probable ones."""
    return 1 + min(LOGPROBS_CAPACITY, vocab_size)


@dataclass
class GraphCounters:
    """How steps were run."""

    graph_steps: int = 0
    eager_steps: Counter[str] = field(default_factory=Counter)
    """Steps that are no replay of one graph, by reason."""
    piecewise_steps: int = 0
    """Those of them in which all but attention was replayed."""
    eagerly_sampled_steps: Counter[str] = field(default_factory=Counter)
    """Steps whose sampling was outside graphs, the host waiting for the device, by reason."""
    late_captures: int = 0
    """Sampling graphs that were captured when a step first needed them."""
    padding_rows: int = 0

    def as_dict(self) -> dict[str, int]:
        """All counts, those of all reasons together."""
        return {
            "graph_steps": self.graph_steps,
            "eager_steps": self.eager_steps.total(),
            "piecewise_steps": self.piecewise_steps,
            "eagerly_sampled_steps": self.eagerly_sampled_steps.total(),
            "late_captures": self.late_captures,
            "padding_rows": self.padding_rows,
        }


class SamplingGraphs:
    """Samples steps whose logits are under way. Owns what sampling graphs write, lanes aside."""

    def __init__(
        self,
        stream: DeviceStream,
        buffers: StepBuffers,
        lanes: LaneState,
        *,
        logits: torch.Tensor,
        row_counts: Sequence[int],
        counters: GraphCounters,
        ranks: Ranks,
    ) -> None:
        """Set memory aside.

        Args:
            stream: that all work is queued on
            buffers: with the steps' columns
            lanes: whose tables stay where they are; the last lane belongs to no sequence
            logits: [max_rows, vocab], fixed memory
            row_counts: ascending; one graph each
            counters: what happened
            ranks: of which the first alone samples
        """
        self._ranks = ranks
        self._stream, self._buffers, self._logits, self._row_counts = stream, buffers, logits, tuple(row_counts)
        self._lanes, self._counters = lanes, counters
        max_rows, vocab_size = logits.shape
        self._results = torch.zeros(2, max_rows, dtype=torch.int64, device=lanes.device)
        """[2, max_rows]: tokens, and whether their logits were finite"""
        length = report_len(vocab_size)
        self._logprobs = torch.zeros(max_rows, length, dtype=torch.float32, device=lanes.device)
        self._logprob_ids = torch.zeros(max_rows, length, dtype=torch.int64, device=lanes.device)
        """[max_rows, report_len], see `report`"""
        self._eager = Sampler(lanes, compiled=False)  # a kernel of the host's would not wait for the stream
        self._graphs: dict[tuple[int, Needs], Graph | None] = {}
        self._last: tuple[IntColumn, int, Needs | str] | None = None

    # -- graphs -----------------------------------------------------------------------------------------------------

    @property
    def num_at_start(self) -> int:
        """Graphs that `capture` captures."""
        return len(CAPTURED_AT_START) * len(self._row_counts) if self._ranks.is_first else 0

    @property
    def num_later_at_most(self) -> int:
        """Graphs that steps may make it capture."""
        return len(CAPTURED_LATER) * len(self._row_counts)

    def capture(self, on_graph: Callable[[bool], None]) -> None:
        """Capture what every load may need, the largest first; the buffers hold padding.

        on_graph: told of each whether there was memory for it
        """
        for rows in reversed(self._row_counts) if self._ranks.is_first else ():
            for needs in CAPTURED_AT_START:
                self._capture(rows, needs)
                on_graph(self._graphs[rows, needs] is not None)

    def prepared(self, plan: StepPlan, rows: int) -> Needs | str:
        """What the graphs of a step's samples do, captured by now; or why they are sampled eagerly.

        To be asked before the step's columns are sent: a missing graph is captured here, on rows of padding.
        """
        needs = self._needs(plan.sample_lanes)
        if isinstance(needs, str) or not self._ranks.is_first:
            return needs
        for graph in _graphs_for(needs):
            if (rows, graph) not in self._graphs:
                self._capture_late(rows, graph)
            if self._graphs[rows, graph] is None:
                return NO_MEMORY
        return needs

    def capacity(self, num_samples: int) -> int | None:
        """The rows of the smallest graph that holds so many samples; None where they are too many."""
        return next((rows for rows in self._row_counts if rows >= num_samples), None)

    def _needs(self, lanes: IntColumn) -> Needs | str:
        """What these lanes need together, or what one of them asks for that no graph does.

        Steps in which nobody comes or goes have the same object for their lanes, and the same answer.
        """
        num_starts = self._lanes.num_starts
        if self._last is None or self._last[0] is not lanes or self._last[1] != num_starts:
            needs: Needs | str = self._lanes.needs(lanes)
            if reason := self._lanes.reason_against_graphs(lanes):
                needs = reason
            elif any((self._lanes.params(lane).logprobs or 0) > LOGPROBS_CAPACITY for lane in lanes):
                needs = f"more than {LOGPROBS_CAPACITY} log-probabilities"
            self._last = lanes, num_starts, needs
        return self._last[2]

    def _capture(self, rows: int, needs: Needs) -> None:
        """Capture a graph; one that the memory has no room for is left out, said aloud."""
        work = partial(self._report, rows) if needs is Needs.REPORT else partial(self._choose, rows, needs)
        try:
            work()
            self._graphs[rows, needs] = self._stream.capture(work)
        except RuntimeError as error:
            if not is_out_of_memory(error) or self._ranks.count > 1:  # others could not know that one does without
                raise
            self._graphs[rows, needs] = None
            log.warning("no memory to capture sampling of %d rows (%s): such steps wait for the device", rows, needs)

    def _capture_late(self, rows: int, needs: Needs) -> None:
        """Capture between steps: nothing may be under way on a stream that is captured."""
        self._stream.record_event().synchronize()
        self._buffers.send_padding(rows)
        self._capture(rows, needs)
        if self._graphs[rows, needs] is None:
            return
        self._counters.late_captures += 1
        log.info("captured sampling for %d rows (%s), at the first step that needs it", rows, needs)

    def _choose(self, rows: int, needs: Needs) -> None:
        """What a graph that chooses tokens holds; a drawn token has the position after its row's."""
        columns = self._buffers.columns
        lanes, positions = columns.sample_lanes[:rows].long(), columns.positions[:rows].long() + 1
        token_ids, finite = choose(needs, self._logits[:rows], self._lanes, lanes, positions, in_graph=True)
        self._lanes.note(lanes, token_ids, count=bool(needs & Needs.ADJUST))
        self._results[0, :rows] = token_ids
        self._results[1, :rows] = finite

    def _report(self, rows: int) -> None:
        """What a graph that reports the chosen tokens holds."""
        num_top = self._logprobs.shape[1] - 1
        values, ids = report(self._logits[:rows], self._results[0, :rows], num_top)
        self._logprobs[:rows] = values
        self._logprob_ids[:rows] = ids

    # -- steps ------------------------------------------------------------------------------------------------------

    def replay(
        self, plan: StepPlan, rows: int, needs: Needs, host: HostBuffers, rows_of_samples: Sequence[int]
    ) -> Callable[[], StepResult]:
        """Replay the graphs that serve these needs, and queue the copies of their results; on rank 0 alone.

        rows_of_samples: the row of each sample in them
        """
        if not self._ranks.is_first:
            host.in_use = self._stream.record_event()
            return lambda: StepResult(step_id=plan.step_id)
        for key in _graphs_for(needs):
            graph = self._graphs[rows, key]
            assert graph is not None
            graph.replay()
        self._stream.copy(host.results, self._results)
        counts: list[int | None] = []
        if needs & Needs.REPORT:
            self._stream.copy(host.logprobs, self._logprobs)
            self._stream.copy(host.logprob_ids, self._logprob_ids)
            counts = [self._lanes.params(lane).logprobs for lane in plan.sample_lanes]
        event = host.in_use = self._stream.record_event()

        def result_after_wait() -> StepResult:
            event.synchronize()
            all_tokens, finite = host.results.tolist()
            token_ids = [all_tokens[row] for row in rows_of_samples]
            logprobs = [
                None if count is None else read_report(host.logprobs[row], host.logprob_ids[row], token, count)
                for token, row, count in zip(token_ids, rows_of_samples, counts, strict=False)
            ]
            return StepResult(
                step_id=plan.step_id,
                token_ids=token_ids,
                logprobs=logprobs,
                failed_samples=frozenset(i for i, row in enumerate(rows_of_samples) if not finite[row]),
            )

        return result_after_wait

    def sample_eagerly(self, plan: StepPlan, reason: str) -> StepResult:
        """Sample the rows of the fixed logits as the plan says, waiting for the device."""
        self._counters.eagerly_sampled_steps[reason] += 1
        if not self._ranks.is_first:
            return StepResult(step_id=plan.step_id)
        lanes, rows = plan.sample_lanes, plan.sample_rows
        sampled = self._eager.sample(self._logits, lanes, plan.sample_positions, rows)
        self._lanes.record(lanes, sampled.token_ids)
        return StepResult(
            step_id=plan.step_id,
            token_ids=sampled.token_ids.tolist(),
            logprobs=sampled.logprobs,
            failed_samples=frozenset((~sampled.finite).nonzero().flatten().tolist()),
        )


def _graphs_for(needs: Needs) -> list[Needs]:
    """The graphs that do, together, what samples need, in order."""
    choice = next(choice for choice in CHOICES if not needs & ~choice & ~Needs.REPORT)
    return [choice, Needs.REPORT] if needs & Needs.REPORT else [choice]
