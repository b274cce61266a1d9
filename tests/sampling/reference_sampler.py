"""The slow twin of the sampler: one sample, plain Python, float64, a full sort."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from cascade_llm.plan import LaneStart
from cascade_llm.sampling_params import SamplingParams


@dataclass(frozen=True)
class Slack:
    """By how much a float32 sampler may see a threshold elsewhere."""

    uniform: float = 0.0
    top_p: float = 0.0
    min_p: float = 0.0


def adjusted_logits(logits: Sequence[float], start: LaneStart, output: Sequence[int]) -> list[float]:
    """Repetition, presence, frequency, bias, min_tokens mask. `output`: all tokens generated so far."""
    params, values = start.params, list(logits)
    for token_id in {*start.prompt_token_ids, *output}:
        penalty = params.repetition_penalty
        values[token_id] = values[token_id] / penalty if values[token_id] > 0 else values[token_id] * penalty
    for token_id in set(output):
        values[token_id] -= params.presence_penalty + params.frequency_penalty * list(output).count(token_id)
    for token_id, bias in (params.logit_bias or {}).items():
        values[token_id] += bias
    if len(output) < params.min_tokens:
        for token_id in start.ending_token_ids:
            values[token_id] = -math.inf
    return values


def kept_probabilities(logits: Sequence[float], params: SamplingParams, slack: Slack = Slack()) -> dict[int, float]:
    """What is drawn from: probability of each kept token, in ascending order of id."""
    largest = max(logits)
    weights = [math.exp((value - largest) / params.temperature) for value in logits]
    top_p = params.top_p + slack.top_p if params.top_p < 1.0 else 1.0
    min_p = params.min_p + slack.min_p if params.min_p > 0.0 else 0.0
    kept = kept_weights(weights, params.top_k or len(weights), top_p, min_p)
    total = sum(kept.values())
    return {i: weight / total for i, weight in kept.items()}


def kept_weights(weights: Sequence[float], top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The tokens of positive weight that top_k, then top_p, then min_p keep, in ascending order of id."""
    order = sorted(range(len(weights)), key=lambda token_id: (-weights[token_id], token_id))[:top_k]
    if top_p < 1.0:
        total, reached, length = math.fsum(weights[i] for i in order), 0.0, 0
        while length < len(order) and reached < top_p * total:
            reached += weights[order[length]]
            length += 1
        order = order[: max(1, length)]
    if min_p > 0.0:
        order = [i for i in order if weights[i] >= min_p * weights[order[0]]] or order[:1]
    return {i: weights[i] for i in sorted(order) if weights[i] > 0.0}


def reference_sample(
    logits: Sequence[float], start: LaneStart, output: Sequence[int], uniform: float, slack: Slack = Slack()
) -> int:
    """The token that the sampler has to choose at position `len(prompt) + len(output)`."""
    values = adjusted_logits(logits, start, output)
    if start.params.greedy:
        return values.index(max(values))
    probabilities = kept_probabilities(values, start.params, slack)
    target, reached = min(max(uniform + slack.uniform, 0.0), 1.0), 0.0
    for token_id, probability in probabilities.items():
        reached += probability
        if reached > target:
            return token_id
    return token_id


def acceptable_tokens(logits: Sequence[float], start: LaneStart, output: Sequence[int], uniform: float) -> set[int]:
    """The tokens that rounding in float32 may lead to: one, unless a threshold is within a millionth or so."""
    slacks = [Slack(top_p=top_p, min_p=min_p) for top_p in (0.0, -2e-6, 2e-6) for min_p in (0.0, -1e-6, 1e-6)]
    shifted = [replace(slack, uniform=shift) for slack in slacks for shift in (0.0, -5e-6, 5e-6)]
    return {reference_sample(logits, start, output, uniform, slack) for slack in shifted}
