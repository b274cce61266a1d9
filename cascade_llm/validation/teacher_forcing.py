"""Reading given texts with the engine's own scheduler and runner, one token per step, whatever the model would say.

Two ways to compute the same model can only be compared while both see the same tokens: after the first different token
they are two different texts. So every step's tokens are the texts' own, and what the model thought of them is kept.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from cascade_llm.config import CascadeConfig
from cascade_llm.engine.assembly import build_scheduler
from cascade_llm.metrics import SchedulerCounters
from cascade_llm.plan import StepPlan, StepResult
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.choice import TokensRead
from cascade_llm.scheduler.sequence import Request
from cascade_llm.worker.model_runner import ModelRunner
from cascade_llm.worker.worker import WorkerFacts

__all__ = ["ForcedReader", "ForcedText", "Reading"]


@dataclass(frozen=True, slots=True)
class ForcedText:
    """A prompt, and the tokens that are said to have been generated after it."""

    prompt_token_ids: Sequence[int]
    continuation: Sequence[int]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the model thought at each position of each continuation, before it was shown the token there."""

    greedy: torch.Tensor
    """[texts, positions], int64: the most probable token"""
    margins: torch.Tensor
    """[texts, positions], float32: its log-probability less that of the second"""
    logprobs: dict[int, torch.Tensor]
    """for each observed text [positions, vocab], float32, on the CPU"""


class ForcedReader:
    """A scheduler over a runner; texts that are read twice are found in its prefix cache the second time."""

    def __init__(
        self, runner: ModelRunner, facts: WorkerFacts, *, page_size: int, max_num_seqs: int, share: CascadeConfig | None
    ) -> None:
        """share: None stores and reads every sequence by itself; else prefixes are stored once, and read as it says."""
        self._runner, self._page_size = runner, page_size
        self._scheduler = build_scheduler(
            facts,
            TokensRead(),
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max(1024, max_num_seqs),
            enable_prefix_caching=share is not None,
            cascade=share or CascadeConfig(enabled=False),
        )
        self._num_read = 0

    @property
    def counters(self) -> SchedulerCounters:
        """What all readings together did."""
        return self._scheduler.counters

    def read(self, texts: Sequence[ForcedText], observed: Collection[int] = ()) -> Reading:
        """Read all texts as one batch; `observed` are those whose whole distributions are kept."""
        num_places = len(texts[0].continuation)
        vocab_size = self._runner.decoder.config.vocab_size
        reading = Reading(
            greedy=torch.zeros(len(texts), num_places, dtype=torch.int64),
            margins=torch.zeros(len(texts), num_places),
            logprobs={i: torch.zeros(num_places, vocab_size) for i in observed},
        )
        for index, text in enumerate(texts):
            self._add(index, text)
        text_of_lane: dict[int, int] = {}
        while self._scheduler.has_unfinished:
            plan = self._scheduler.schedule()
            assert plan is not None
            text_of_lane.update((start.lane, start.seed) for start in plan.lane_starts)
            self._step(plan, texts, [text_of_lane[lane] for lane in plan.sample_lanes], reading)
        return reading

    def _add(self, index: int, text: ForcedText) -> None:
        params = SamplingParams(temperature=0, max_tokens=len(text.continuation), ignore_eos=True)
        self._scheduler.add(
            Request(
                request_id=f"text-{self._num_read}",
                prompt_token_ids=list(text.prompt_token_ids),
                params=params,
                seed=index,  # nothing is drawn: it names the text in the plan
            )
        )
        self._num_read += 1

    def _step(self, plan: StepPlan, texts: Sequence[ForcedText], read_now: list[int], reading: Reading) -> None:
        """Run one step; sample i of it belongs to text `read_now[i]`."""
        logits = self._runner.logits(plan, plan.sample_rows)
        positions = [
            position - len(texts[index].prompt_token_ids)
            for index, position in zip(read_now, plan.sample_positions, strict=True)
        ]
        forced = [texts[index].continuation[position] for index, position in zip(read_now, positions, strict=True)]
        for row, (index, position) in enumerate(zip(read_now, positions, strict=True)):
            logprobs = logits[row].float().log_softmax(-1)
            best, second = logprobs.topk(2).values.tolist()
            reading.greedy[index, position] = logprobs.argmax()
            reading.margins[index, position] = best - second
            if index in reading.logprobs:
                reading.logprobs[index][position] = logprobs.cpu()
        self._scheduler.commit(plan, StepResult(step_id=plan.step_id, token_ids=forced))
