"""The model against transformers' implementation of it, with the same weights.

transformers computes in float32, sequence by sequence, and is taken for the truth. In float32 ours must equal it up to
a fixed tolerance; where a model makes more of rounding than that, as Gemma's large activations do, transformers is
compared with itself in float64. In another dtype rounding decides, and how much it does is measured: transformers in
that dtype against itself in float32, on the same prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.engine.assembly import build_scheduler
from cascade_llm.engine.engine import Engine
from cascade_llm.engine.requests import RequestState
from cascade_llm.errors import UnsupportedModelError
from cascade_llm.loader.checkpoint import Checkpoint
from cascade_llm.outputs import TokenLogprob
from cascade_llm.sampling_params import SamplingParams
from cascade_llm.scheduler.cascade.choice import TokensRead
from cascade_llm.scheduler.sequence import Request
from cascade_llm.validation.attention_error import largest_difference
from cascade_llm.validation.report import Check, Progress
from cascade_llm.validation.transformers_model import TransformersModel
from cascade_llm.worker.executor import Executor
from cascade_llm.worker.worker import WorkerFacts

__all__ = ["check_transformers"]

Report = Sequence[TokenLogprob]
"""What the engine reported of one continuation, position by position."""

NUM_COMPARED = 50
"""Most probable tokens whose log-probabilities are compared at each position."""

FLOAT32_TOLERANCE = 1e-3
"""Of a log-probability, between two float32 implementations of thirty-odd layers."""
DTYPE_ALLOWANCE = 2.0
"""Of transformers' own error in the dtype: the largest of few prompts varies."""


def check_transformers(
    executor: Executor,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    page_size: int,
    num_new: int,
    progress: Progress,
) -> list[Check]:
    """Greedy continuations by the whole engine, and the log-probabilities that it reports at every position of them."""
    facts = executor.facts
    if checkpoint.is_dummy:
        return [Check(name="against transformers", passed=None, note="dummy weights: there is nothing to load")]
    if facts.kv_dtype.itemsize < facts.dtype.itemsize:
        pages = _name(facts.kv_dtype)
        note = f"pages of {pages} round K and V, transformers does not: validate once without kv_cache_dtype"
        return [Check(name="against transformers", passed=None, note=note)]
    ours = _continue_greedily(executor, prompts, page_size, num_new, progress)
    try:
        progress("transformers in float32", 1, 3)
        truth = _read(checkpoint, torch.float32, facts.device, prompts, ours)
        top_ids = [
            torch.tensor([[token_id for token_id, _ in position.top] for position in positions]) for positions in ours
        ]
        found = [torch.tensor([[logprob for _, logprob in each.top] for each in positions]) for positions in ours]
        wanted, other = _at(truth, top_ids), facts.dtype
        if other == torch.float32 and _largest_difference(found, wanted) > FLOAT32_TOLERANCE:
            other = torch.float64
        progress(f"transformers in {_name(other)}", 2, 3)
        same = truth if other == torch.float32 else _read(checkpoint, other, facts.device, prompts, ours)
    except UnsupportedModelError as error:
        return [Check(name="against transformers", passed=None, note=str(error))]
    progress("done", 3, 3)
    own_error = _largest_difference(_at(same, top_ids), wanted)
    tolerance = max(FLOAT32_TOLERANCE, DTYPE_ALLOWANCE * own_error)
    return [
        _check_logprobs("log-probabilities after the prompts", found, wanted, slice(0, 1), own_error, tolerance, facts),
        _check_logprobs("log-probabilities while decoding", found, wanted, slice(1, None), own_error, tolerance, facts),
        _check_greedy(ours, truth, tolerance),
    ]


def _continue_greedily(
    executor: Executor, prompts: Sequence[Sequence[int]], page_size: int, num_new: int, progress: Progress
) -> list[Report]:
    """What the whole engine chose and reported for each prompt, the prompts being one batch."""
    scheduler = build_scheduler(
        executor.facts, TokensRead(), page_size=page_size, max_num_seqs=len(prompts), max_num_batched_tokens=1024
    )
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True, logprobs=NUM_COMPARED)
    engine = Engine(scheduler, executor, None, lag=0)
    states = [
        engine.add(Request(request_id=str(index), prompt_token_ids=list(prompt), params=params, seed=0))
        for index, prompt in enumerate(prompts)
    ]
    while engine.has_unfinished:
        progress("greedy tokens by the engine", sum(map(_num_tokens, states)), num_new * len(states))
        engine.step()
    for state in states:
        if state.output.error is not None:
            raise state.output.error
    return [state.output.outputs[0].logprobs or [] for state in states]


def _num_tokens(state: RequestState) -> int:
    return len(state.output.outputs[0].token_ids)


def _read(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    ours: Sequence[Report],
) -> list[torch.Tensor]:
    """What transformers thinks at each position of our continuations: [positions, vocab] per prompt."""
    model = TransformersModel(checkpoint, dtype, device)
    return [
        model.logprobs([*prompt, *(position.token_id for position in positions)])[len(prompt) - 1 : -1]
        for prompt, positions in zip(prompts, ours, strict=True)
    ]


def _at(logprobs: Sequence[torch.Tensor], token_ids: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [each.gather(1, ids) for each, ids in zip(logprobs, token_ids, strict=True)]


def _largest_difference(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    return max(largest_difference(a, b) for a, b in zip(one, other, strict=True))


def _check_logprobs(
    name: str,
    found: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    positions: slice,
    own_error: float,
    tolerance: float,
    facts: WorkerFacts,
) -> Check:
    error = _largest_difference([each[positions] for each in found], [each[positions] for each in wanted])
    of = " from float64" if facts.dtype == torch.float32 else ""
    rounding = f"transformers in {_name(facts.dtype)} is off by {own_error:.2g}{of}"
    return Check(
        name=f"{name}, {NUM_COMPARED} most probable",
        passed=error <= tolerance,
        found=f"largest difference {error:.2g}",
        allowed=f"{tolerance:.2g}",
        note=f"{rounding}, allowed {DTYPE_ALLOWANCE:g} times that" if own_error else "",
        figures={"largest": error, "tolerance": tolerance, "transformers_own": own_error},
    )


def _check_greedy(ours: Sequence[Report], truth: Sequence[torch.Tensor], tolerance: float) -> Check:
    """Each of our tokens is transformers' most probable one, or as good as it within twice the tolerance."""
    margins, total = [], 0
    for positions, logprobs in zip(ours, truth, strict=True):
        total += len(positions)
        for position, row in zip(positions, logprobs, strict=True):
            if int(row.argmax()) != position.token_id:
                margins.append((row.max() - row[position.token_id]).item())
    margins.sort(reverse=True)
    return Check(
        name="greedy tokens",
        passed=not margins or margins[0] < 2 * tolerance,
        found=f"{len(margins)} of {total} differ" + (f", largest margin {margins[0]:.2g}" if margins else ""),
        allowed=f"margin {2 * tolerance:.2g}",
        figures={"differing": len(margins), "tokens": total, "margins": margins, "allowed_margin": 2 * tolerance},
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
