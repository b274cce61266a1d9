"""Log-probabilities that CUDA graphs can hold: those of `logprobs`, without sizes that the device alone knows.

All rows get as many most probable tokens as the capacity; the host takes of each what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.outputs import TokenLogprob
from cascade_llm.sampling.candidates import BLOCK_LEN, block_maxima
from cascade_llm.sampling.logprobs import log_sum_exp
from cascade_llm.sampling.workspace import Workspace

__all__ = ["LOGPROBS_CAPACITY", "GraphLogprobs", "most_probable", "read_logprobs", "report_len"]

LOGPROBS_CAPACITY = 20
ID_BITS = 32


def report_len(vocab_size: int) -> int:
    """Numbers that come back for each row: the chosen token's, and those of the most probable ones."""
    return 1 + min(LOGPROBS_CAPACITY, vocab_size)


def most_probable(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of each row, largest first, ties by ascending id.

    They lie in the `count` blocks of the largest maxima, ties by ascending block: the maximum of each of these comes
    before any value of a block that is not among them.

    Args:
        values: [n, padded vocab], float32, no NaN
        count: at most the vocabulary's size

    Returns:
        token ids [n, count], int64; values [n, count]
    """
    blocks = values.view(len(values), -1, BLOCK_LEN)
    maxima = block_maxima(values)
    num_blocks = min(count, maxima.shape[1])
    block_ids = torch.arange(maxima.shape[1], device=values.device)
    chosen = _ranking(maxima, block_ids).topk(num_blocks, dim=-1, sorted=False).indices
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK_LEN)).flatten(1)
    token_ids = (chosen[:, :, None] * BLOCK_LEN + torch.arange(BLOCK_LEN, device=values.device)).flatten(1)
    places = _ranking(inside, token_ids).topk(count, dim=-1).indices
    return token_ids.gather(1, places), inside.gather(1, places)


def _ranking(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys, no two alike in a row: the larger the value, then the smaller the id, the larger the key."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 equals 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys: torch.Tensor = (ordered.long() << ID_BITS) + (2**ID_BITS - 1 - ids)
    return keys


class GraphLogprobs:
    """The reports of a step, in fixed device memory."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device) -> None:
        length = report_len(vocab_size)
        self.values = torch.zeros(max_rows, length, dtype=torch.float32, device=device)
        """[max_rows, report_len]: log-probability of the chosen token, then of the most probable"""
        self.ids = torch.zeros(max_rows, length, dtype=torch.int64, device=device)
        """[max_rows, report_len]: rank of the chosen token, then the ids of the most probable"""

    def note_raw(self, values: torch.Tensor, workspace: Workspace) -> torch.Tensor:
        """Report the most probable tokens of raw logits [rows, padded vocab], float32; returns normalizers [rows]."""
        rows = len(values)
        normalizers = log_sum_exp(values, block_maxima(values), workspace)
        ids, largest = most_probable(values, self.ids.shape[1] - 1)
        self.values[:rows, 1:] = largest - normalizers[:, None]
        self.ids[:rows, 1:] = ids
        return normalizers

    def note_chosen(self, logits: torch.Tensor, token_ids: torch.Tensor, normalizers: torch.Tensor) -> None:
        """Report the chosen tokens [rows], int64, of raw logits [rows, vocab]."""
        rows = len(logits)
        chosen = logits.gather(1, token_ids[:, None])
        self.values[:rows, 0] = chosen[:, 0].float() - normalizers
        self.ids[:rows, 0] = (logits > chosen).sum(-1) + 1


def read_logprobs(
    values: torch.Tensor,
    ids: torch.Tensor,
    token_ids: Sequence[int],
    places: Sequence[int],
    counts: Sequence[int | None],
) -> list[TokenLogprob | None]:
    """What the samples asked for, from the host's copies; `places`: the row of each sample."""
    reports: list[TokenLogprob | None] = []
    for token_id, place, count in zip(token_ids, places, counts, strict=True):
        if count is None:
            reports.append(None)
            continue
        chosen, *largest = values[place].tolist()
        rank, *top = ids[place].tolist()
        reports.append(TokenLogprob(token_id, chosen, rank, tuple(zip(top, largest, strict=True))[:count]))
    return reports
