"""Runs step plans: one process, one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cascade_llm.attention.backend import AttentionBackend, PreparedAttention
from cascade_llm.attention.columns import column_tensor
from cascade_llm.kv_cache.paged_kv_cache import PagedKVCache
from cascade_llm.models.decoder import Decoder
from cascade_llm.models.finite_check import FirstNonFinite
from cascade_llm.outputs import TokenLogprob
from cascade_llm.plan import IntColumn, StepPlan, StepResult
from cascade_llm.runner.device import thread_limit
from cascade_llm.runner.lanes import LaneState
from cascade_llm.runner.sampler import Sampler

__all__ = ["ModelRunner", "PendingStep", "StepAttention"]

LOGPROB_ROWS = 256


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A step that was handed to the device."""

    plan: StepPlan
    result: Callable[[], StepResult]
    """Waits for the device, once."""


class StepAttention:
    """Attention of one step, as the decoder calls it: write, then read."""

    def __init__(self, prepared: PreparedAttention, kv_cache: PagedKVCache, slots: torch.Tensor) -> None:
        """`slots`: [rows] int64, where the rows' K/V go."""
        self._prepared = prepared
        self._kv_cache = kv_cache
        self._slots = slots

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `attention.backend.Attention`."""
        self._kv_cache.write(layer, k, v, self._slots)
        return self._prepared.attend(layer, q)[0]


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
    ) -> None:
        self.decoder, self.backend, self.kv_cache = decoder, backend, kv_cache
        self._lanes, self._sampler = lanes, Sampler(lanes)
        self._num_threads, self._debug = num_threads, debug

    def submit(self, plan: StepPlan) -> PendingStep:
        """Start a step. Its result is there when `result()` returns; steps run in the order of submission."""
        if self._debug:
            plan.check()
        with torch.inference_mode(), thread_limit(self._num_threads):
            outcome = self._run(plan)
        return PendingStep(plan, lambda: outcome)

    def logits(self, plan: StepPlan, rows: IntColumn) -> torch.Tensor:
        """Run a step without sampling and return the logits of `rows`, [len(rows), vocab]; for validation."""
        with torch.inference_mode(), thread_limit(self._num_threads):
            hidden, _ = self._forward(plan)
            return self.decoder.logits(hidden[self._index(rows)])

    def _run(self, plan: StepPlan) -> StepResult:
        hidden, broken_stage = self._forward(plan)
        prompt_logprobs = self._prompt_logprobs(plan, hidden)
        if not len(plan.sample_rows):
            return StepResult(step_id=plan.step_id, prompt_logprobs=prompt_logprobs)
        rows = list(dict.fromkeys(plan.sample_rows))  # n samples of one prompt share a row
        place = {row: i for i, row in enumerate(rows)}
        logits = self.decoder.logits(hidden[torch.tensor(rows, device=hidden.device)])
        sampled = self._sampler.sample(
            logits, plan.sample_lanes, plan.sample_positions, [place[row] for row in plan.sample_rows]
        )
        self._lanes.record(plan.sample_lanes, sampled.token_ids)
        return StepResult(
            step_id=plan.step_id,
            token_ids=sampled.token_ids.tolist(),
            logprobs=sampled.logprobs,
            prompt_logprobs=prompt_logprobs,
            failed_samples=frozenset((~sampled.finite).nonzero().flatten().tolist()),
            failure_detail=broken_stage,
        )

    def _prompt_logprobs(self, plan: StepPlan, hidden: torch.Tensor) -> list[TokenLogprob]:
        """What prompts asked for, some rows at a time: logits of a long prompt would fill the memory."""
        reports: list[TokenLogprob] = []
        for begin in range(0, len(plan.prompt_logprob_rows), LOGPROB_ROWS):
            part = slice(begin, begin + LOGPROB_ROWS)
            logits = self.decoder.logits(hidden[self._index(plan.prompt_logprob_rows[part])])
            reports += self._sampler.prompt_logprobs(
                logits, range(len(logits)), plan.prompt_logprob_token_ids[part], plan.prompt_logprob_counts[part]
            )
        return reports

    def _forward(self, plan: StepPlan) -> tuple[torch.Tensor, str | None]:
        """Hidden states [rows, hidden], and with `debug` the first stage that was not finite."""
        self._lanes.start(plan.lane_starts)
        self.kv_cache.copy_pages(plan.page_copies)
        token_ids = self._index(plan.token_ids)
        if len(plan.lane_rows):
            token_ids[self._index(plan.lane_rows)] = self._lanes.last_tokens[self._index(plan.lane_row_lanes)]
        prepared = self.backend.prepare(plan.cascade)
        attention = StepAttention(prepared, self.kv_cache, self._index(plan.slots))
        observer = FirstNonFinite() if self._debug else None
        hidden = self.decoder.forward(token_ids, self._index(plan.positions), attention, observer)
        return hidden, observer.stage if observer else None

    def _index(self, column: IntColumn) -> torch.Tensor:
        """A column on the device, int64; a copy."""
        return column_tensor(column).to(self.decoder.device, torch.int64)
