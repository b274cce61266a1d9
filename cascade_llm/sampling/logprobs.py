"""Log-probabilities of the raw model: natural logarithm, float32, before penalties, temperature and filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.outputs import TokenLogprob
from cascade_llm.sampling.candidates import Candidates, block_maxima, float_rows, kth_floor
from cascade_llm.sampling.workspace import Workspace

__all__ = ["log_sum_exp", "token_logprobs"]

CHUNK_ELEMENTS = 2**21
"""float32 logits worked on at a time (8 MiB): thousands of prompt rows never exist in float32 together."""


def token_logprobs(
    logits: torch.Tensor,
    rows: Sequence[int],
    token_ids: Sequence[int],
    counts: Sequence[int],
    workspace: Workspace,
) -> list[TokenLogprob]:
    """Report tokens, and beside each the most probable ones.

    Args:
        logits: [any, vocab], floating; rows that are not finite give values that mean nothing
        rows: [n], rows of it, repeats allowed
        token_ids: [n], the token reported for each
        counts: [n], how many most probable tokens to list, most probable first, ties by ascending id

    Returns:
        [n]; rank is 1 + the number of tokens with a larger logit
    """
    chunk_len = max(1, CHUNK_ELEMENTS // logits.shape[1])
    reports: list[TokenLogprob] = []
    for begin in range(0, len(rows), chunk_len):
        part = slice(begin, begin + chunk_len)
        values = float_rows(logits, list(rows[part]), workspace)
        part_counts = [min(count, logits.shape[1]) for count in counts[part]]
        reports += _chunk_logprobs(values, list(token_ids[part]), part_counts, workspace)
    return reports


def _chunk_logprobs(
    values: torch.Tensor, token_ids: list[int], counts: list[int], workspace: Workspace
) -> list[TokenLogprob]:
    """`token_logprobs` of float32 rows [n, padded vocab]."""
    maxima = block_maxima(values)
    chosen = values.gather(1, torch.tensor(token_ids, device=values.device)[:, None])[:, 0]
    normalizers = log_sum_exp(values, maxima, workspace)
    ranks = (_num_larger(values, maxima, chosen) + 1).tolist()
    logprobs = (chosen - normalizers).tolist()
    tops = _most_probable(values, maxima, normalizers, counts)
    return [TokenLogprob(*fields) for fields in zip(token_ids, logprobs, ranks, tops, strict=True)]


def log_sum_exp(values: torch.Tensor, maxima: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    """log sum exp of each row [n]: the maximum less the logarithm of its own probability.

    Twice as fast as `torch.logsumexp` on a CPU, which also allocates a second copy of the rows.
    """
    weights = workspace.take("weights", tuple(values.shape), dtype=torch.float32, device=values.device)
    largest = torch.softmax(values, -1, out=weights).amax(-1)
    return maxima.amax(-1) - largest.log()


def _num_larger(values: torch.Tensor, maxima: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """How many values of each row exceed its chosen one [n], int64."""
    reaching = Candidates.select(values, maxima, chosen)
    larger = reaching.rows[reaching.values > chosen[reaching.rows]]
    return torch.bincount(larger, minlength=len(chosen))


def _most_probable(
    values: torch.Tensor, maxima: torch.Tensor, normalizers: torch.Tensor, counts: list[int]
) -> list[tuple[tuple[int, float], ...]]:
    largest = max(counts)
    tops: list[tuple[tuple[int, float], ...]] = [()] * len(counts)
    if largest == 0:
        return tops
    ks = torch.tensor(counts, device=values.device).clamp(min=1)
    candidates = Candidates.select(values, maxima, kth_floor(maxima, ks, largest))
    for group in candidates.groups(padding=-torch.inf):
        ordered, place = group.values.sort(dim=-1, descending=True, stable=True)
        logprobs = (ordered - normalizers[group.rows][:, None])[:, :largest].tolist()
        token_ids = group.token_ids.gather(1, place)[:, :largest].tolist()
        for row, row_ids, row_logprobs in zip(group.rows.tolist(), token_ids, logprobs, strict=True):
            tops[row] = tuple(zip(row_ids, row_logprobs, strict=True))[: counts[row]]
    return tops
