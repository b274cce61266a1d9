"""The sampling graphs: which there are, how a step's samples go through one, what comes back.

There is a graph for each number of rows and each feature set. Greedy steps, plain and filtered draws are captured at
the start; the others, fifteen sets that few loads use, at the first step of so many rows that needs one, between steps.
So the start is short, the number of graphs bounded, and what a request asks for slows one step per capacity of rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from cascade_llm.attention.flashinfer.ops import FlashInferOps
from cascade_llm.device.stream import DeviceStream, Graph
from cascade_llm.plan import LaneStart, StepPlan, StepResult
from cascade_llm.sampling.graph_logprobs import GraphLogprobs, read_logprobs
from cascade_llm.sampling.graph_sampler import GraphSampler
from cascade_llm.sampling.lane_lists import LaneLists
from cascade_llm.sampling.lanes import LaneState
from cascade_llm.sampling.sampler import Sampler
from cascade_llm.sampling.sampling_features import Choice, FeatureSet, LaneFeatures
from cascade_llm.sampling.token_usage import UsageTable
from cascade_llm.worker.step_buffers import HostImage, StepArena

__all__ = ["GraphCounters", "SamplingGraphs"]

log = logging.getLogger("cascade_llm")

CAPTURED_AT_START = tuple(FeatureSet(choice) for choice in reversed(Choice))
NO_MEMORY = "no memory for its sampling graph"


@dataclass
class GraphCounters:
    """How steps were run."""

    graph_steps: int = 0
    eager_steps: Counter[str] = field(default_factory=Counter)
    """Steps outside graphs, by reason."""
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
            "eagerly_sampled_steps": self.eagerly_sampled_steps.total(),
            "late_captures": self.late_captures,
            "padding_rows": self.padding_rows,
        }


class SamplingGraphs:
    """Samples steps whose logits are under way. Owns what sampling graphs write, lanes aside."""

    def __init__(
        self,
        stream: DeviceStream,
        arena: StepArena,
        lanes: LaneState,
        usage: UsageTable,
        ops: FlashInferOps,
        *,
        logits: torch.Tensor,
        row_counts: Sequence[int],
        send_padding: Callable[[int], None],
        counters: GraphCounters,
    ) -> None:
        """Set memory aside.

        Args:
            stream: that all work is queued on
            arena: with the steps' columns
            lanes: their last one belongs to no sequence
            usage: of these lanes
            ops: FlashInfer's filters
            logits: [max_rows, vocab], fixed memory
            row_counts: ascending; one graph each
            send_padding: queues a step of so many rows that nobody asked for, to run graphs on before they are captured
            counters: what happened
        """
        self._stream, self._arena, self._logits, self._row_counts = stream, arena, logits, tuple(row_counts)
        self._lanes, self._send_padding, self._counters = lanes, send_padding, counters
        max_rows, vocab_size = logits.shape
        self._features = LaneFeatures(lanes.num_lanes, vocab_size)
        self._lists = LaneLists(lanes.num_lanes, vocab_size, lanes.device, stream.upload)
        self._logprobs = GraphLogprobs(max_rows, vocab_size, lanes.device)
        self._sampler = GraphSampler(lanes, usage, self._lists, self._logprobs, max_rows, ops)
        self._results = torch.zeros(2, max_rows, dtype=torch.int64, device=lanes.device)
        self._eager = Sampler(lanes, compiled=False)  # a kernel of the host's would not wait for the stream
        self._graphs: dict[tuple[int, FeatureSet], Graph | None] = {}

    # -- graphs -----------------------------------------------------------------------------------------------------

    @property
    def num_at_start(self) -> int:
        """Graphs that `capture` captures."""
        return len(CAPTURED_AT_START) * len(self._row_counts)

    @property
    def num_later_at_most(self) -> int:
        """Graphs that steps may make it capture."""
        return len(list(FeatureSet.every())) * len(self._row_counts) - self.num_at_start

    def capture(self, on_graph: Callable[[bool], None]) -> None:
        """Capture what every load may need, the largest first; the arena holds padding.

        on_graph: told of each whether there was memory for it
        """
        for rows in reversed(self._row_counts):
            for features in CAPTURED_AT_START:
                self._capture(rows, features)
                on_graph(self._graphs[rows, features] is not None)

    def prepared(self, plan: StepPlan, rows: int) -> FeatureSet | str:
        """What a step's samples need, its graph at hand; or why they are sampled eagerly.

        To be asked before the step's columns are sent: a missing graph is captured here, on rows of padding.
        """
        features = self._features.of(plan.sample_lanes)
        if isinstance(features, str):
            return features
        if (rows, features) not in self._graphs:
            self._capture_late(rows, features)
        return NO_MEMORY if self._graphs[rows, features] is None else features

    def capacity(self, num_samples: int) -> int | None:
        """The rows of the smallest graph that holds so many samples; None where they are too many."""
        return next((rows for rows in self._row_counts if rows >= num_samples), None)

    def _capture(self, rows: int, features: FeatureSet) -> None:
        """Capture a graph; one that the memory has no room for is left out, said aloud."""
        work = partial(self._sample, rows, features)
        try:
            work()
            self._graphs[rows, features] = self._stream.capture(work)
        except torch.OutOfMemoryError:
            self._graphs[rows, features] = None
            log.warning("no memory to capture sampling of %d rows (%s): such steps wait for the device", rows, features)

    def _capture_late(self, rows: int, features: FeatureSet) -> None:
        """Capture between steps: nothing may be under way on a stream that is captured."""
        self._stream.mark().wait()
        self._send_padding(rows)
        self._capture(rows, features)
        if self._graphs[rows, features] is None:
            return
        self._counters.late_captures += 1
        log.info("captured sampling for %d rows (%s), at the first step that needs it", rows, features)

    def _sample(self, rows: int, features: FeatureSet) -> None:
        """What a graph holds."""
        columns = self._arena.columns
        self._sampler.sample(
            features,
            self._logits[:rows],
            columns.sample_lanes[:rows],
            columns.positions[:rows],
            self._results[:, :rows],
        )

    # -- steps ------------------------------------------------------------------------------------------------------

    def start(self, starts: Sequence[LaneStart]) -> None:
        """Take note of sequences that enter lanes; queued."""
        self._features.start(starts)
        self._lists.start(starts)

    def replay(
        self, plan: StepPlan, rows: int, features: FeatureSet, image: HostImage, places: Sequence[int]
    ) -> Callable[[], StepResult]:
        """Replay a graph and queue the copies of its results; `places`: the row of each sample in them."""
        graph = self._graphs[rows, features]
        assert graph is not None
        graph.replay()
        self._stream.copy(image.results, self._results)
        if features.logprobs:
            self._stream.copy(image.logprobs, self._logprobs.values)
            self._stream.copy(image.logprob_ids, self._logprobs.ids)
        counts = self._features.logprob_counts(plan.sample_lanes.tolist()) if features.logprobs else []
        mark = image.in_use = self._stream.mark()

        def result_after_wait() -> StepResult:
            mark.wait()
            all_tokens, finite = image.results.tolist()
            token_ids = [all_tokens[place] for place in places]
            return StepResult(
                step_id=plan.step_id,
                token_ids=token_ids,
                logprobs=read_logprobs(image.logprobs, image.logprob_ids, token_ids, places, counts) if counts else (),
                failed_samples=frozenset(i for i, place in enumerate(places) if not finite[place]),
            )

        return result_after_wait

    def sample_eagerly(self, plan: StepPlan, reason: str) -> StepResult:
        """Sample the rows of the fixed logits as the plan says, waiting for the device."""
        self._counters.eagerly_sampled_steps[reason] += 1
        lanes, rows = plan.sample_lanes.tolist(), plan.sample_rows.tolist()
        sampled = self._eager.sample(self._logits, lanes, plan.sample_positions.tolist(), rows)
        self._lanes.record(lanes, sampled.token_ids)
        return StepResult(
            step_id=plan.step_id,
            token_ids=sampled.token_ids.tolist(),
            logprobs=sampled.logprobs,
            failed_samples=frozenset((~sampled.finite).nonzero().flatten().tolist()),
        )
