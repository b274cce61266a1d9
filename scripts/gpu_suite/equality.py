"""When two runs of the same requests gave equal tokens.

Tokens are equal, or at the first difference the two were nearly tied: their scores in the first run, penalties counted,
lie within twice the tolerance. Up to there log-probabilities agree within the tolerance. A token that was drawn may
also differ because rounding has moved the edge that its number fell on, which happens to few.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from cascade_llm.outputs import CompletionOutput, TokenLogprob
from cascade_llm.sampling_params import SamplingParams

__all__ = ["TOLERANCE", "Equality"]

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.08}
"""Of a log-probability, for dummy models of two layers: some roundings of a logit between -4 and 4."""
DRAWN_ALLOWANCE = 0.05
"""Of the compared tokens, how many may be the first of their sequence to differ where they are drawn."""
LISTED = 5


@dataclass(slots=True)
class Equality:
    """What comparing found, over all sequences."""

    tolerance: float
    sequences: int = 0
    tokens: int = 0
    near_ties: int = 0
    draws_differing: int = 0
    largest_logprob_difference: float = 0.0
    wrong: list[str] = field(default_factory=list)
    """What is more than rounding, the first few."""
    num_wrong: int = 0

    @property
    def passed(self) -> bool:
        """Whether the two runs are equal in the sense above."""
        few_draws = self.draws_differing <= max(1.0, DRAWN_ALLOWANCE * self.tokens)
        return self.num_wrong == 0 and self.tokens > 0 and few_draws

    def add(
        self, one: Mapping[str, CompletionOutput], other: Mapping[str, CompletionOutput], params: SamplingParams
    ) -> None:
        """Take in two runs of the same requests."""
        if one.keys() != other.keys():
            self._note(f"requests {sorted(one.keys() ^ other.keys())[:LISTED]} are in one run only")
        for name in one.keys() & other.keys():
            self._add(name, one[name], other[name], params)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"passed": self.passed, **asdict(self)}

    def _add(self, name: str, one: CompletionOutput, other: CompletionOutput, params: SamplingParams) -> None:
        assert one.logprobs is not None
        assert other.logprobs is not None
        self.sequences += 1
        for place, (a, b) in enumerate(zip(one.logprobs, other.logprobs, strict=False)):
            self.tokens += 1
            difference = _largest_difference(a, b)
            self.largest_logprob_difference = max(self.largest_logprob_difference, difference)
            if not difference <= self.tolerance:
                self._note(f"{name}, token {place}: log-probabilities differ by {difference:.3g}")
                return
            if a.token_id != b.token_id:
                self._differ(f"{name}, token {place}", one.token_ids[:place], a, b, params)
                return
        is_whole = "abort" not in (one.finish_reason, other.finish_reason)
        if is_whole and (len(one.token_ids), one.finish_reason) != (len(other.token_ids), other.finish_reason):
            self._note(f"{name}: {one.finish_reason} and {other.finish_reason} after equal tokens")

    def _differ(self, where: str, before: list[int], a: TokenLogprob, b: TokenLogprob, params: SamplingParams) -> None:
        if params.temperature > 0:
            self.draws_differing += 1
            return
        gap = _gap(before, a, b, params)
        if gap is None or gap > 2 * self.tolerance:
            self._note(f"{where}: {a.token_id} and {b.token_id}, {gap if gap is None else round(gap, 4)} apart")
        else:
            self.near_ties += 1

    def _note(self, what: str) -> None:
        self.num_wrong += 1
        if len(self.wrong) < LISTED:
            self.wrong.append(what)


def _largest_difference(a: TokenLogprob, b: TokenLogprob) -> float:
    """Over the tokens that both report; infinite where they have none in common, NaN stays."""
    ours, theirs = (dict(x.top) for x in (a, b))
    differences = [abs(ours[token_id] - theirs[token_id]) for token_id in ours.keys() & theirs.keys()]
    return max(differences, key=lambda x: (x != x, x), default=float("inf"))


def _gap(before: list[int], a: TokenLogprob, b: TokenLogprob, params: SamplingParams) -> float | None:
    """How much better the first token was, in the first run; None where the other is not among those reported."""
    counts, reported = Counter(before), dict(a.top)
    if b.token_id not in reported:
        return None

    def score(token_id: int, logprob: float) -> float:
        count = counts[token_id]
        return logprob - params.presence_penalty * (count > 0) - params.frequency_penalty * count

    return score(a.token_id, a.logprob) - score(b.token_id, reported[b.token_id])
