"""Decode steps as CUDA graphs: captured once for each shape, replayed with new integers in fixed memory.

A step goes: write its integers into pinned host buffers, queue one copy, plan what changed, replay the forward graph,
replay the sampling graph, queue the copy of the results. The host waits for nothing but, two steps later, its own
buffers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from cascade_llm.attention.backend import Attention, StepAttention, column_tensor
from cascade_llm.attention.flashinfer.backend import FlashInferAttentionBackend
from cascade_llm.attention.flashinfer.graph import GraphAttention, SharedColumns
from cascade_llm.device.ranks import Ranks
from cascade_llm.device.start_errors import is_out_of_memory
from cascade_llm.device.stream import DeviceStream, Graph
from cascade_llm.errors import CapacityError
from cascade_llm.models.decoder import Decoder
from cascade_llm.plan import CascadeLevel, CascadePlan, IntColumn, StepPlan, StepResult, int_column
from cascade_llm.sampling.lanes import LaneState, Needs
from cascade_llm.tiling import max_tiles
from cascade_llm.worker.graph_sampling import GraphCounters, SamplingGraphs, report_len
from cascade_llm.worker.graph_shapes import GraphShape, fitting_shape
from cascade_llm.worker.piecewise import PiecewiseGraphs
from cascade_llm.worker.step_buffers import HostBuffers, Padding, StepBuffers
from cascade_llm.worker.window_buffers import WindowBuffers

__all__ = ["CaptureReport", "CudaGraphs", "OnCapture"]

log = logging.getLogger("cascade_llm")

OnCapture = Callable[[int, int], None]
"""Told how many graphs are captured, and of how many."""


@dataclass(frozen=True)
class CaptureReport:
    """What capturing took."""

    num_graphs: int
    seconds: float
    num_bytes: int
    dropped: tuple[GraphShape, ...] = ()
    """Shapes that memory or workspace had no room for; their steps run eagerly."""
    num_later_at_most: int = 0
    """Sampling graphs that are captured when a step first needs them, at most."""
    usage_bytes: int = 0
    """Counts of used tokens, for penalties: allocated before, and no part of `num_bytes`."""


@dataclass(frozen=True)
class _CapturedShape:
    attentions: tuple[GraphAttention, ...]
    """one per attention kind"""
    forward: Graph
    nothing_shared: CascadeLevel
    """what a kind reads at a level that only others have"""


class CudaGraphs:
    """The graphs of one runner. Owns the fixed memory that they read and write."""

    def __init__(
        self,
        decoder: Decoder,
        backend: FlashInferAttentionBackend,
        lanes: LaneState,
        *,
        shapes: Sequence[GraphShape],
        max_model_len: int,
        max_num_batched_tokens: int,
        ranks: Ranks | None = None,
    ) -> None:
        """Set memory aside; `capture` fills it.

        Args:
            decoder: the model
            backend: its pool's last page belongs to no sequence: padding rows write to it
            lanes: its last lane belongs to no sequence: the tokens of padding rows go there
            shapes: to capture, see `graph_shapes`; the largest first
            max_model_len: tokens of the longest sequence
            max_num_batched_tokens: rows of the largest step, prefill among them
            ranks: that capture and replay the same graphs, their exchanges among them; default one alone
        """
        self._ranks = ranks or Ranks()
        self._decoder, self._backend, self._lanes = decoder, backend, lanes
        self._stream: DeviceStream = backend.device.stream
        self._num_processors = backend.platform.num_processors
        pool = backend.kv_cache
        self._group_size = backend.spec.group_size
        self._all_shapes = tuple(shapes)
        max_rows, max_shared_levels = shapes[0].rows, max(len(shape.capacities) for shape in shapes)
        self._most_tiles = max_tiles(self._num_processors, backend.spec.num_kv_heads)
        self._row_counts = sorted({shape.rows for shape in self._all_shapes})
        max_segments = max((capacity for shape in self._all_shapes for capacity in shape.capacities), default=0)
        kinds = decoder.config.attention_kinds
        kind_pages = pool.kind_pages if len(pool.kind_pages) > 1 else pool.kind_pages * len(kinds)
        self._paddings = [
            Padding(pages - 1, pool.page_size, lanes.num_lanes - 1, lanes.no_lane) for pages in kind_pages
        ]
        self._shared = [
            [SharedColumns(max_segments, pool.num_pages, lanes.device) for _ in range(max_shared_levels)] for _ in kinds
        ]
        self._buffers = StepBuffers(
            self._stream,
            max_rows=max_rows,
            max_leaf_pages=max_rows * -(-max_model_len // pool.page_size),
            shared_len=len(kinds) * max_shared_levels * (3 * (max_segments + 1) + pool.num_pages),
            num_logprobs=report_len(lanes.vocab_size),
            padding=self._paddings[0],
        )
        self._windows = [
            None
            if window_len is None
            else WindowBuffers(
                self._stream, window_len, max_rows=max_rows, max_model_len=max_model_len, padding=padding
            )
            for window_len, padding in zip(kinds, self._paddings, strict=True)
        ]
        self._logits = torch.zeros(max_rows, lanes.vocab_size, dtype=decoder.dtype, device=lanes.device)
        self.counters = GraphCounters()
        self._sampling = SamplingGraphs(
            self._stream,
            self._buffers,
            lanes,
            logits=self._logits,
            row_counts=self._row_counts,
            counters=self.counters,
            ranks=self._ranks,
        )
        self._pieces = PiecewiseGraphs(decoder, backend.spec, self._stream, max_num_batched_tokens, self._ranks)
        self._usage_bytes = lanes.usage.allocate().nbytes
        self._shapes: dict[GraphShape, _CapturedShape] = {}
        self._last_fit: tuple[tuple[tuple[CascadeLevel, ...], int], GraphShape | None] | None = None

    # -- capture ----------------------------------------------------------------------------------------------------

    def capture(self, on_capture: OnCapture | None = None) -> CaptureReport:
        """Capture all graphs, the largest first; one that does not fit into memory is left out, said aloud."""
        started, bytes_before = time.perf_counter(), self._stream.pool_bytes()
        dropped: list[GraphShape] = []
        num_captured, total = 0, len(self._all_shapes) + self._sampling.num_at_start
        total += self._pieces.num_graphs

        def count(captured: int = 1) -> None:
            nonlocal num_captured
            num_captured += captured
            if on_capture is not None:
                on_capture(num_captured, total)

        for shape in self._all_shapes:
            try:
                self._capture_forward(shape)
            except (RuntimeError, CapacityError) as error:
                has_no_room = isinstance(error, CapacityError) or is_out_of_memory(error)
                if not has_no_room or self._ranks.count > 1:  # the others would exchange what this one does not
                    raise
                dropped.append(shape)
                log.warning("no memory for the graph of %s, such steps will run eagerly: %s", shape, error)
            count(shape in self._shapes)
        self._sampling.capture(count)
        self._pieces.capture(count)
        self._stream.record_event().synchronize()
        return CaptureReport(
            num_captured,
            time.perf_counter() - started,
            self._stream.pool_bytes() - bytes_before,
            tuple(dropped),
            self._sampling.num_later_at_most,
            self._usage_bytes,
        )

    def _capture_forward(self, shape: GraphShape) -> None:
        host = self._buffers.take_host()
        host.write_padding(0, shape.rows, first_leaf_page=0)
        self._buffers.send(host, shape.rows)
        attentions = tuple(self._padded_attention(shape, kind, host) for kind in range(len(self._windows)))
        host.in_use = self._stream.record_event()
        work = partial(self._forward, attentions, shape.rows)
        work()
        nothing = CascadeLevel(*map(int_column, ([0, shape.rows], [0, 0], (), [0])))
        self._shapes[shape] = _CapturedShape(attentions, self._stream.capture(work), nothing)

    def _padded_attention(self, shape: GraphShape, kind: int, host: HostBuffers) -> GraphAttention:
        """The attention of one kind in a graph, planned over padding rows."""
        rows, window = shape.rows, self._windows[kind]
        has_edge = window is not None and bool(shape.capacities)
        attention = GraphAttention(
            self._backend,
            rows,
            shape.capacities,
            self._buffers.leaf_buffers(rows) if window is None else window.leaf_buffers(rows),
            self._shared[kind],
            self._num_processors,
            window_len=None if window is None else window.window_len,
            edge_buffers=window.edge_buffers(rows) if window is not None and has_edge else None,
        )
        if window is None:
            attention.plan_leaf(host.leaf_columns(rows), None)
        else:
            written = window.write(None, None, rows, host.place)
            window.send(written, host.place)
            attention.plan_leaf(written.leaf, None)
            if has_edge:
                attention.plan_edge(window.edge_columns(rows))
        for position, capacity in enumerate(shape.capacities):
            attention.plan_shared(position, None, host.stand_in_columns(rows, capacity, self._paddings[kind].page))
        return attention

    def _forward(self, attentions: Sequence[GraphAttention], rows: int) -> None:
        """What a forward graph holds: from the columns in the buffers to logits in fixed memory."""
        columns, kinds = self._buffers.columns, self._decoder.config.layer_kinds
        slots = [
            columns.slots[:rows] if window is None or not kind else window.slots(rows)
            for kind, window in enumerate(self._windows)
        ]
        step = StepAttention(attentions, self._backend, slots, kinds)
        hidden = self._decoder.forward(self._input_tokens(rows), columns.positions[:rows], step)
        self._decoder.write_logits(hidden, self._logits[:rows])

    def _input_tokens(self, rows: int) -> torch.Tensor:
        """Of lane and host, the one that names a token: the other says -1."""
        columns = self._buffers.columns
        from_lanes = self._lanes.last_tokens.index_select(0, columns.token_lanes[:rows])
        return torch.maximum(from_lanes, columns.token_ids[:rows])

    # -- steps ------------------------------------------------------------------------------------------------------

    def submit(self, plan: StepPlan) -> Callable[[], StepResult] | None:
        """Queue a step; returns what waits for its result, or None where no graph holds the step (counted)."""
        shape = self._shape_of(plan)
        if isinstance(shape, str):
            self.counters.eager_steps[shape] += 1
            return None
        captured, needs = self._shapes[shape], self._sampling.prepared(plan, shape.rows)
        self.counters.graph_steps += 1
        self.counters.padding_rows += shape.rows - plan.num_rows
        host = self._buffers.take_host()
        num_leaf_pages = host.write_step(plan, shape.rows)
        self._buffers.send(host, num_leaf_pages)
        for kind, cascade in enumerate(plan.cascades):
            self._plan_kind(kind, cascade, plan.slots_of(kind), captured, shape, host)
        captured.forward.replay()
        return self._sampled(plan, shape.rows, needs, host)

    def _plan_kind(
        self,
        kind: int,
        plan: CascadePlan,
        slots: IntColumn,
        captured: _CapturedShape,
        shape: GraphShape,
        host: HostBuffers,
    ) -> None:
        """Bring one attention kind's columns to the device, and plan what changed."""
        attention, window = captured.attentions[kind], self._windows[kind]
        if window is None:
            attention.plan_leaf(host.leaf_columns(shape.rows), plan.leaf.kv_page_indptr)
        else:
            written = window.write(plan, slots, shape.rows, host.place)
            window.send(written, host.place)
            attention.plan_leaf(written.leaf, written.follows)
        missing = len(shape.capacities) - len(plan.shared_levels)
        for position, level in enumerate((*plan.shared_levels, *[captured.nothing_shared] * missing)):
            if not attention.holds(position, level):
                columns = host.shared_columns(level, shape.rows, shape.capacities[position])
                attention.plan_shared(position, level, columns)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor | None:
        """Hidden states [rows, hidden] of a mixed step, all but attention by replays; None where it has too many rows.

        Args:
            token_ids, positions: [rows] int64
            attention: of this step's rows
        """
        if self._pieces.capacity(len(token_ids)) is None:
            return None
        self.counters.piecewise_steps += 1
        return self._pieces.forward(token_ids, positions, attention)

    def sample(self, plan: StepPlan, hidden: torch.Tensor) -> Callable[[], StepResult] | None:
        """Sample a step whose forward pass was eager, without waiting for it; None where no graph does what it needs.

        hidden: [rows, hidden], on the device
        """
        count = len(plan.sample_rows)
        if not count:
            return None
        rows = self._sampling.capacity(count)
        needs: Needs | str
        if rows is None:
            needs = "more samples than a graph has rows"
        elif len(plan.prompt_logprob_rows):
            needs = "prompt log-probabilities"
        elif len(plan.draft_lens) or plan.token_bitmasks:
            needs = "proposed tokens" if len(plan.draft_lens) else "a token mask"
        else:
            needs = self._sampling.prepared(plan, rows)
        if rows is None or isinstance(needs, str):
            self.counters.eagerly_sampled_steps[str(needs)] += 1
            return None
        host = self._buffers.take_host()
        host.write_padding(0, rows, first_leaf_page=0)
        host.columns.positions[:count] = column_tensor(plan.sample_positions) - 1
        host.columns.sample_lanes[:count] = column_tensor(plan.sample_lanes)
        self._buffers.send(host, rows)
        sampled_rows = self._stream.upload(column_tensor(plan.sample_rows).long())
        self._decoder.write_logits(hidden[sampled_rows], self._logits[:count])
        return self._sampling.replay(plan, rows, needs, host, range(count))

    def _sampled(self, plan: StepPlan, rows: int, needs: Needs | str, host: HostBuffers) -> Callable[[], StepResult]:
        """Queue the sampling of a step whose logits are under way; `needs` may be why it has to be eager."""
        if not len(plan.sample_rows):
            host.in_use = self._stream.record_event()
            return lambda: StepResult(step_id=plan.step_id)
        if isinstance(needs, str):
            host.in_use = self._stream.record_event()
            result = self._sampling.sample_eagerly(plan, needs)
            return lambda: result
        return self._sampling.replay(plan, rows, needs, host, plan.sample_rows.tolist())

    def _shape_of(self, plan: StepPlan) -> GraphShape | str:
        """The graph that serves a step, or why none does."""
        if plan.num_rows != plan.num_sequences:
            return "a sequence has several rows"
        if len(plan.prompt_logprob_rows):
            return "prompt log-probabilities"
        if len(set(plan.sample_rows)) != len(plan.sample_rows):
            return "several samples of one row"
        if plan.token_bitmasks:
            return "a token mask"
        return self._fitting_shape(*plan.cascades) or "no graph of that shape"

    def _fitting_shape(self, plan: CascadePlan, *others: CascadePlan) -> GraphShape | None:
        """The smallest graph that holds the plans of all kinds; looked up anew when shared levels are other objects."""
        key = tuple([level for each in (plan, *others) for level in each.shared_levels]), plan.num_rows
        if self._last_fit is None or self._last_fit[0] != key:
            shapes = list(self._shapes)
            self._last_fit = key, fitting_shape(plan, shapes, self._group_size, self._most_tiles, others)
        return self._last_fit[1]
