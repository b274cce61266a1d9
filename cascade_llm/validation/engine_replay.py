"""Recorded steps with their token ids, run again by a model: do the same tokens come out?

The runner is handed the recorded plans as they are, except that every row's input token is the recorded one: a token
that differs is counted once, and does not make a different text of all that follows. Penalties see what is sampled
here.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch

from cascade_llm.config import EngineOptions
from cascade_llm.device.devices import DTYPES
from cascade_llm.errors import PlanError
from cascade_llm.loader.resolve import open_checkpoint
from cascade_llm.models.architectures import model_config_from_hf
from cascade_llm.plan import StepPlan, int_column
from cascade_llm.plan_file import PlanFileHeader, PlanFileReader, RecordedStep
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.validation.replay import truncation_check
from cascade_llm.validation.report import Check, Progress
from cascade_llm.worker.model_runner import ModelRunner
from cascade_llm.worker.worker import build_worker

__all__ = ["NEAR_TIES", "replay_engine"]

NEAR_TIES = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 1.0}
"""Log-probability by which a recorded greedy token may be less probable than ours; twice the dtype's rounding noise."""
DRAWN_ALLOWANCE = 0.1
"""Of the drawn tokens, how many may differ: rounding moves the edges between tokens that a draw falls on."""


@dataclass(slots=True)
class _Tokens:
    """What came of the samples."""

    compared: int = 0
    greedy: int = 0
    margins: list[tuple[float, int]] = field(default_factory=list)
    """Greedy samples that differ: how much less probable the recorded token is here, and the frame."""
    drawn_differing: int = 0
    """Differing samples that were drawn, or chosen from adjusted logits."""
    finiteness_differing: int = 0
    """Samples whose logits were finite in one run only."""


def replay_engine(
    path: str | os.PathLike[str],
    model: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    max_steps: int | None = None,
    allow_truncated: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> list[Check]:
    """Run a recording's steps with a model and compare the sampled tokens.

    Args:
        path: a file of `LLM(record_plans=..., record_token_ids=True)`
        model: what it was recorded with
        options: device, num_threads, attention_backend, dtype, debug; all else is as recorded

    Raises:
        PlanError: the file is not whole, was recorded without token ids, or with a model of another shape
        ConfigError, ModelError, CapacityError: as `LLM`
    """
    with PlanFileReader(path, allow_truncated=allow_truncated) as reader:
        header = reader.header
        if not header.token_ids:
            raise PlanError(
                f"{reader.path} was recorded without token ids, so the engine cannot be replayed: record it with "
                "record_token_ids=True, or leave the model out to replay attention alone"
            )
        load_format = str(options.get("load_format", "auto"))
        checkpoint = open_checkpoint(model, load_format=load_format)
        config = model_config_from_hf(checkpoint.hf_config(), checkpoint.generation_config())
        header.check_model(checkpoint.name, config)
        dtype = DTYPES[header.dtype]
        progress(f"loading {checkpoint.name}", 0, 0)
        runner, facts = build_worker(_options(options, header), checkpoint, pool_pages=tuple(header.pool_pages))
        replay, num_steps = _Replay(runner), 0
        for step in islice(reader, max_steps):
            progress(f"{reader.path.name}, frame {step.frame}", num_steps, 0)
            replay.step(step)
            num_steps += 1
        check = _check(replay.tokens, num_steps, facts.backend.name, NEAR_TIES[dtype])
        if checkpoint.name != header.model:
            note = f"recorded with {header.model}, replayed with {checkpoint.name} of the same shape"
            check = replace(check, note="; ".join(part for part in (note, check.note) if part))
        return [check, *truncation_check(reader)]


def _options(options: Mapping[str, Any], header: PlanFileHeader) -> EngineOptions:
    return EngineOptions(
        **{**options, "dtype": header.dtype, "kv_cache_dtype": header.kv_cache_dtype},
        page_size=header.page_size,
        max_model_len=header.max_model_len,
        max_num_seqs=header.max_num_seqs,
        max_num_batched_tokens=max(8192, header.max_num_seqs),
    )


class _Replay:
    """The runner, and what the recording has said of each lane so far."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self._last_tokens: dict[int, int] = {}
        self._plainly_greedy: dict[int, bool] = {}
        self.tokens = _Tokens()

    def step(self, step: RecordedStep) -> None:
        """Run one step and compare what it samples."""
        plan = self._with_recorded_inputs(step.plan)
        result = self._runner.submit(plan)()
        self._plainly_greedy.update((start.lane, _is_plainly_greedy(start.params)) for start in plan.lane_starts)
        if step.token_ids is None:  # the step failed, or the recording ends before its result
            return
        differing = []
        rejected = step.rejected_samples
        for sample, (recorded, lane) in enumerate(zip(step.token_ids, plan.sample_lanes, strict=True)):
            if sample in rejected:
                continue
            is_failed = sample in result.failed_samples
            self.tokens.compared += 1
            self.tokens.greedy += self._plainly_greedy[lane]
            self._last_tokens[lane] = recorded or 0
            if recorded is None or is_failed:
                self.tokens.finiteness_differing += (recorded is None) != is_failed
            elif result.token_ids[sample] != recorded:
                differing.append((sample, result.token_ids[sample], recorded))
        if differing:
            self._note_differing(plan, differing, step.frame)

    def _with_recorded_inputs(self, plan: StepPlan) -> StepPlan:
        """The plan with every input token spelled out; one that was never recorded belongs to a sequence that ended."""
        token_ids = array("i", plan.token_ids)
        for row, lane in zip(plan.lane_rows, plan.lane_row_lanes, strict=True):
            token_ids[row] = self._last_tokens.get(lane, 0)
        nothing = int_column(())
        return replace(plan, token_ids=int_column(token_ids), lane_rows=nothing, lane_row_lanes=nothing)

    def _note_differing(self, plan: StepPlan, differing: list[tuple[int, int, int]], frame: int) -> None:
        """`differing`: (sample, our token, the recorded one)."""
        greedy = [each for each in differing if self._plainly_greedy[plan.sample_lanes[each[0]]]]
        self.tokens.drawn_differing += len(differing) - len(greedy)
        if not greedy:
            return
        again = replace(plan, lane_starts=(), page_copies=())  # both were done when the step ran
        logits = self._runner.logits(again, int_column(plan.sample_rows[sample] for sample, _, _ in greedy)).float()
        for row, (_, ours, recorded) in zip(logits, greedy, strict=True):
            self.tokens.margins.append(((row[ours] - row[recorded]).item(), frame))


def _is_plainly_greedy(params: SamplingParams) -> bool:
    """Whether the token is the raw logits' largest."""
    adjusted = params.logit_bias or params.min_tokens or params.presence_penalty or params.frequency_penalty
    return params.greedy and not adjusted and params.repetition_penalty == 1.0


def _check(tokens: _Tokens, num_steps: int, backend: str, near_tie: float) -> Check:
    margins = sorted(tokens.margins, reverse=True)
    num_drawn = tokens.compared - tokens.greedy
    num_differing = len(margins) + tokens.drawn_differing + tokens.finiteness_differing
    worst = f"; largest margin of a greedy token {margins[0][0]:.2g} at frame {margins[0][1]}" if margins else ""
    passed = (
        tokens.finiteness_differing == 0
        and (not margins or margins[0][0] <= near_tie)
        and tokens.drawn_differing <= max(1, DRAWN_ALLOWANCE * num_drawn)
    )
    return Check(
        name=f"{backend}: sampled tokens against the recorded ones",
        passed=passed if tokens.compared else None,
        found=f"{num_differing} of {tokens.compared} differ ({num_steps} steps){worst}",
        allowed=f"greedy: margin {near_tie:g}; drawn: {DRAWN_ALLOWANCE:.0%}",
        note="" if tokens.compared else "the recording has no results",
        figures={
            "steps": num_steps,
            "tokens": tokens.compared,
            "greedy": tokens.greedy,
            "greedy_differing": len(margins),
            "drawn_differing": tokens.drawn_differing,
            "finiteness_differing": tokens.finiteness_differing,
            "margins": [{"margin": margin, "frame": frame} for margin, frame in margins],
        },
    )
