"""Runs step plans: one process, one device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from cascade_llm.attention.backend import AttentionBackend, column_tensor
from cascade_llm.device.devices import thread_limit
from cascade_llm.device.ranks import Ranks
from cascade_llm.device.stream import DeviceStream
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.models.decoder import Decoder, FirstNonFinite
from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import IntColumn, StepPlan, StepResult
from cascade_llm.sampling.lanes import LaneState
from cascade_llm.sampling.logprobs import token_logprobs
from cascade_llm.sampling.masks import TokenMasks
from cascade_llm.sampling.sampler import Sampler
from cascade_llm.worker.cuda_graphs import CudaGraphs
from cascade_llm.worker.recorded_steps import ForwardInputs, RecordedSteps

__all__ = ["ModelRunner"]

LOGPROB_ROWS = 256


class ModelRunner:
    """Turns a `StepPlan` into a `StepResult`; owns the weights, the KV pool and the lanes.

    It knows nothing of requests: a step is rows, pages, lanes and samples.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: AttentionBackend,
        kv_cache: PagedKVCache,
        lanes: LaneState,
        *,
        num_threads: int | None = None,
        debug: bool = False,
        ranks: Ranks | None = None,
        stream: DeviceStream | None = None,
        graphs: CudaGraphs | None = None,
        recorded: RecordedSteps | None = None,
    ) -> None:
        """Take what steps are run on.

        Args:
            num_threads: of a step on a CPU
            debug: whether plans are checked, and the first stage found that is not finite
            ranks: that run the same steps; rank 0 samples, and its lanes' tokens go to the others
            stream: what a GPU's work is queued on
            graphs: captured decode steps, tried before eager ones
            recorded: the same on a CPU; steps that are observed from outside must not be replayed
        """
        self.decoder, self.backend, self.kv_cache = decoder, backend, kv_cache
        self.graphs, self.recorded = graphs, recorded
        self._stream = stream
        self._lanes = lanes
        self._sampler = Sampler(lanes, compiled=stream is None)  # a kernel of the host's would not wait for a stream
        self._num_threads, self._debug, self._ranks = num_threads, debug, ranks or Ranks()

    def with_attention(self, backend: AttentionBackend) -> ModelRunner:
        """The same weights, pool and lanes with another backend over that pool, and without graphs; for validation."""
        return ModelRunner(
            self.decoder,
            backend,
            self.kv_cache,
            self._lanes,
            num_threads=self._num_threads,
            debug=self._debug,
            ranks=self._ranks,
            stream=self._stream,
        )

    def submit(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Start a step; returns what waits for its result, once. Steps run in the order of submission."""
        if self._debug:
            plan.check()
        with self._running():
            self._lanes.start(plan.lane_starts)
            self._copy_pages(plan)
            result = self.graphs.submit(plan) if self.graphs is not None else None
            result = result or self._run(plan)
            if len(plan.sample_rows):
                self._ranks.broadcast(self._lanes.last_tokens)
            return result

    def logits(self, plan: StepPlan, rows: IntColumn) -> torch.Tensor:
        """Run a step without sampling and return the logits of `rows`, [len(rows), vocab]; for validation."""
        with self._running():
            self._lanes.start(plan.lane_starts)
            self._copy_pages(plan)
            hidden, _ = self._forward(plan)
            return self.decoder.logits(hidden[self._index(rows)])

    @contextmanager
    def _running(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(thread_limit(self._num_threads))
            if self._stream is not None:
                stack.enter_context(self._stream.active())
            yield

    def _run(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Run a step eagerly; where graphs can sample it, the host does not wait for the device."""
        hidden, broken_stage = self._forward(plan)
        sampled_later = self.graphs.sample(plan, hidden) if self.graphs is not None else None
        if sampled_later is not None:
            return sampled_later
        result = self._sampled(plan, hidden, broken_stage)
        return lambda: result

    def _sampled(self, plan: StepPlan, hidden: torch.Tensor, broken_stage: str | None) -> StepResult:
        prompt_logprobs = self._prompt_logprobs(plan, hidden)
        if not len(plan.sample_rows):
            return StepResult(step_id=plan.step_id, prompt_logprobs=prompt_logprobs)
        rows = sorted(set(plan.sample_rows))  # n samples of one prompt share a row
        place = {row: i for i, row in enumerate(rows)}
        if len(rows) < len(hidden):  # a copy of all rows would wake torch's threads, whose spinning delays ours
            hidden = hidden[torch.tensor(rows, device=hidden.device)]
        logits = self.decoder.logits(hidden)
        if not self._ranks.is_first:
            return StepResult(step_id=plan.step_id)
        sampled = self._sampler.sample(
            logits,
            plan.sample_lanes,
            plan.sample_positions,
            [place[row] for row in plan.sample_rows],
            self._masks(plan),
        )
        token_ids: list[int] = sampled.token_ids.tolist()
        accepted_counts = _accepted_counts(plan, token_ids)
        for samples in _in_turns(plan, accepted_counts):
            self._lanes.record([plan.sample_lanes[i] for i in samples], sampled.token_ids[samples])
        return StepResult(
            step_id=plan.step_id,
            token_ids=token_ids,
            accepted_counts=accepted_counts,
            logprobs=sampled.logprobs,
            prompt_logprobs=prompt_logprobs,
            failed_samples=frozenset((~sampled.finite).nonzero().flatten().tolist()),
            failure_detail=broken_stage,
        )

    def _masks(self, plan: StepPlan) -> TokenMasks | None:
        """Which tokens the samples may be; None where any."""
        if not plan.token_bitmasks:
            return None
        words = torch.stack([column_tensor(mask) for mask in plan.token_bitmasks])
        return TokenMasks(words.to(self.decoder.device), self._index(plan.sample_mask_rows))

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor) -> list[TokenLogprob]:
        """What prompts asked for, some rows at a time: logits of a long prompt would fill the memory."""
        reports: list[TokenLogprob] = []
        for begin in range(0, len(plan.prompt_logprob_rows), LOGPROB_ROWS):
            part = slice(begin, begin + LOGPROB_ROWS)
            logits = self.decoder.logits(hidden[self._index(plan.prompt_logprob_rows[part])])
            if not self._ranks.is_first:
                continue
            reports += token_logprobs(
                logits, range(len(logits)), plan.prompt_logprob_token_ids[part], plan.prompt_logprob_counts[part]
            )
        return reports

    def _forward(self, plan: StepPlan) -> tuple[torch.Tensor, str | None]:
        """Hidden states [rows, hidden], and with `debug` the first stage that was not finite."""
        token_ids = self._index(plan.token_ids)
        if len(plan.lane_rows):
            token_ids[self._index(plan.lane_rows)] = self._lanes.last_tokens[self._index(plan.lane_row_lanes)]
        prepared = [self.backend.prepare(cascade) for cascade in plan.cascades]
        slots = [self._index(column).to(self.backend.slot_dtype) for column in (plan.slots, *plan.window_slots)]
        inputs = ForwardInputs(token_ids, self._index(plan.positions), slots, prepared, plan.layer_kinds)
        if self.recorded is not None and (hidden := self.recorded.forward(inputs)) is not None:
            return hidden, None
        attention, positions = inputs.attention(self.backend), inputs.positions
        if self.graphs is not None and (hidden := self.graphs.forward(token_ids, positions, attention)) is not None:
            return hidden, None
        observer = FirstNonFinite() if self._debug else None
        hidden = self.decoder.forward(token_ids, positions, attention, observer)
        return hidden, observer.stage if observer else None

    def _copy_pages(self, plan: StepPlan) -> None:
        self.kv_cache.copy_pages(plan.page_copies, None if self._stream is None else self._stream.upload)

    def _index(self, column: IntColumn) -> torch.Tensor:
        """A column on the device, int64; a copy, which is queued where there is a stream: a plain one would be waited
        for, behind the step before."""
        values = column_tensor(column).long()
        return values.to(self.decoder.device) if self._stream is None else self._stream.upload(values)


def _accepted_counts(plan: StepPlan, token_ids: Sequence[int]) -> list[int]:
    """For each draft how many proposed tokens the model drew itself, up to the first that it did not."""
    counts = []
    for first, length in zip(plan.draft_samples, plan.draft_lens, strict=True):
        proposed = [plan.token_ids[row] for row in plan.sample_rows[first + 1 : first + length + 1]]
        drawn = token_ids[first : first + length]
        counts.append(next((i for i in range(length) if drawn[i] != proposed[i]), length))
    return counts


def _in_turns(plan: StepPlan, accepted_counts: Sequence[int]) -> list[list[int]]:
    """The samples that count, in turns in which no lane comes twice: of a draft the accepted ones and the one after."""
    turns: list[list[int]] = [list(range(len(plan.sample_lanes)))]
    for first, length, accepted in zip(plan.draft_samples, plan.draft_lens, accepted_counts, strict=True):
        for offset in range(1, length + 1):
            turns[0].remove(first + offset)
            if offset <= accepted:
                turns += [[]] if len(turns) <= offset else []
                turns[offset].append(first + offset)
    return turns
