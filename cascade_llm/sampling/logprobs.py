"""Log-probabilities of the raw model: natural logarithm, float32, before penalties, temperature and filters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cascade_llm.outputs import TokenLogprob
from cascade_llm.sampling.draw import BLOCK_LEN

__all__ = ["most_probable", "padded_floats", "read_report", "report", "token_logprobs"]

CHUNK_ELEMENTS = 2**21
"""float32 logits worked on at a time (8 MiB): thousands of prompt rows never exist in float32 together."""
ID_BITS = 32


def padded_floats(logits: torch.Tensor) -> torch.Tensor:
    """A float32 copy of logits [n, vocab], padded with -inf to whole blocks and at least one column more."""
    num_rows, vocab_size = logits.shape
    padded = torch.empty(num_rows, (vocab_size // BLOCK_LEN + 1) * BLOCK_LEN, device=logits.device)
    padded[:, :vocab_size] = logits
    padded[:, vocab_size:].fill_(-torch.inf)
    return padded


def report(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of log-probability reports; a CUDA graph can hold it.

    Args:
        logits: [n, vocab], floating; rows that are not finite give values that mean nothing
        token_ids: [n], int64, the token reported for each
        num_top: how many most probable tokens to list, at most the vocabulary's size

    Returns:
        values [n, 1 + num_top], float32: log-probability of the token, then of the most probable ones; ids
        [n, 1 + num_top], int64: rank of the token, then the ids of the most probable ones
    """
    chunk_len = max(1, CHUNK_ELEMENTS // logits.shape[1])
    values = torch.empty(len(logits), 1 + num_top, device=logits.device)
    ids = torch.empty(len(logits), 1 + num_top, dtype=torch.int64, device=logits.device)
    for begin in range(0, len(logits), chunk_len):
        part = slice(begin, begin + chunk_len)
        rows = padded_floats(logits[part])
        chosen = rows.gather(1, token_ids[part, None])
        # half the time of `torch.logsumexp` on a CPU: the maximum less the logarithm of its own probability
        normalizers = rows.amax(-1, keepdim=True) - torch.softmax(rows, -1).amax(-1, keepdim=True).log()
        values[part, :1] = chosen - normalizers
        ids[part, 0] = (rows > chosen).sum(-1) + 1
        top_ids, top = most_probable(rows, num_top)
        values[part, 1:] = top - normalizers
        ids[part, 1:] = top_ids
    return values, ids


def most_probable(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest values of each row, largest first, ties by ascending id.

    They lie in the `count` blocks of the largest maxima, ties by ascending block: the maximum of each of these comes
    before any value of a block that is not among them.

    Args:
        values: [n, whole blocks], float32, no NaN
        count: at most the vocabulary's size

    Returns:
        token ids [n, count], int64; values [n, count]
    """
    blocks = values.view(len(values), -1, BLOCK_LEN)
    maxima = blocks.amax(-1)
    block_ids = torch.arange(maxima.shape[1], device=values.device)
    chosen = _order_keys(maxima, block_ids).topk(min(count, len(block_ids)), dim=-1, sorted=False).indices
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK_LEN)).flatten(1)
    token_ids = (chosen[:, :, None] * BLOCK_LEN + torch.arange(BLOCK_LEN, device=values.device)).flatten(1)
    places = _order_keys(inside, token_ids).topk(count, dim=-1).indices
    return token_ids.gather(1, places), inside.gather(1, places)


def _order_keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys, no two alike in a row: the larger the value, then the smaller the id, the larger the key."""
    bits = (values + 0.0).view(torch.int32)  # -0.0 equals 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys: torch.Tensor = (ordered.long() << ID_BITS) + (2**ID_BITS - 1 - ids)
    return keys


def token_logprobs(
    logits: torch.Tensor, rows: Sequence[int], token_ids: Sequence[int], counts: Sequence[int]
) -> list[TokenLogprob]:
    """Report tokens, and beside each the most probable ones.

    Args:
        logits: [any, vocab], floating
        rows: [n], rows of it, repeats allowed
        token_ids: [n], the token reported for each
        counts: [n], how many most probable tokens to list, most probable first, ties by ascending id

    Returns:
        [n]; rank is 1 + the number of tokens with a larger logit
    """
    if not len(rows):
        return []
    columns = torch.tensor([list(rows), list(token_ids)], device=logits.device)
    values, ids = report(logits[columns[0]], columns[1], min(max(counts), logits.shape[1]))
    values, ids = values.cpu(), ids.cpu()
    return [
        read_report(values[i], ids[i], token_id, count)
        for i, (token_id, count) in enumerate(zip(token_ids, counts, strict=True))
    ]


def read_report(values: torch.Tensor, ids: torch.Tensor, token_id: int, count: int) -> TokenLogprob:
    """One row of a `report` on the host.

    Args:
        values, ids: [1 + num_top]
        token_id: the token that was reported
        count: how many most probable tokens to list, at most `num_top`
    """
    logprob, *top = values[: 1 + count].tolist()
    rank, *top_ids = ids[: 1 + count].tolist()
    return TokenLogprob(token_id, logprob, rank, tuple(zip(top_ids, top, strict=True)))
