"""Where the large values of a vocabulary row are, without sorting the row.

A row is cut into blocks of consecutive token ids. The maximum of each block costs one pass at memory speed; whatever
needs only the largest values of a row (argmax, the k largest, all above a floor) then reads a few blocks of it.
Tokens are always met in ascending order of id, so ties are resolved by id wherever they matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from cascade_llm.sampling.workspace import Workspace

__all__ = ["BLOCK_LEN", "CandidateGroup", "Candidates", "block_maxima", "first_argmax", "float_rows", "kth_floor"]

BLOCK_LEN = 128
"""Token ids per block: blocks must be few (their maxima are searched) and small (hot ones are read whole)."""

SMALL_GROUP_LEN = 128
GROUP_GROWTH = 4


def float_rows(logits: torch.Tensor, rows: Sequence[int], workspace: Workspace) -> torch.Tensor:
    """Copy rows of logits into float32, padded with -inf to whole blocks.

    Args:
        logits: [any, vocab], floating
        rows: [n], rows of it, repeats allowed

    Returns:
        [n, padded vocab], float32, free to be changed in place until the next call with this workspace
    """
    num_rows, vocab_size, device = len(rows), logits.shape[1], logits.device
    if rows == list(range(rows[0], rows[0] + num_rows)):
        source = logits[rows[0] : rows[0] + num_rows]
    else:
        source = workspace.take("source_rows", (num_rows, vocab_size), dtype=logits.dtype, device=device)
        torch.index_select(logits, 0, torch.tensor(rows, device=device), out=source)
    padded_shape = num_rows, vocab_size + -vocab_size % BLOCK_LEN
    padded = workspace.take("float_rows", padded_shape, dtype=torch.float32, device=device)
    padded[:, :vocab_size] = source
    padded[:, vocab_size:] = -torch.inf
    return padded


def block_maxima(values: torch.Tensor) -> torch.Tensor:
    """The largest value of each block: [n, padded vocab] -> [n, num_blocks]; NaN where a block holds one."""
    return values.view(values.shape[0], -1, BLOCK_LEN).amax(-1)


def first_argmax(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest index of each row's maximum, and the maximum (NaN where the row holds one).

    One pass at memory speed; on a CPU `torch.argmax` takes several times as long, and in bfloat16 far more.

    Args:
        values: [n, padded vocab], float32

    Returns:
        indices [n], int64; maxima [n], float32
    """
    num_rows = values.shape[0]
    maxima = block_maxima(values)
    block = maxima.argmax(-1)
    rows = torch.arange(num_rows, device=values.device)
    inside = values.view(num_rows, -1, BLOCK_LEN)[rows, block].argmax(-1)
    return block * BLOCK_LEN + inside, maxima[rows, block]


def kth_floor(maxima: torch.Tensor, ks: torch.Tensor, largest_k: int) -> torch.Tensor:
    """A value that at least k values of the row reach: the k-th largest block maximum.

    Args:
        maxima: [n, num_blocks]
        ks: [n], int64, at least 1
        largest_k: max(ks), known on the host

    Returns:
        [n]; -inf where k exceeds the number of blocks, so that every token is a candidate
    """
    num_blocks = maxima.shape[1]
    largest = maxima.topk(min(largest_k, num_blocks), -1).values
    floor = largest.gather(1, (ks - 1).clamp(max=largest.shape[1] - 1)[:, None])[:, 0]
    return floor.masked_fill(ks > num_blocks, -torch.inf)


@dataclass(frozen=True, slots=True)
class CandidateGroup:
    """Candidates of some rows, padded to the longest of them."""

    rows: torch.Tensor
    """[r], which rows of the whole these are"""
    values: torch.Tensor
    """[r, c], in ascending order of token id; padding has the value given to `Candidates.groups`"""
    token_ids: torch.Tensor
    """[r, c], int64"""


@dataclass(frozen=True, slots=True)
class Candidates:
    """All tokens whose value reaches their row's floor, row after row, in ascending order of token id."""

    values: torch.Tensor
    """[total]"""
    token_ids: torch.Tensor
    """[total], int64"""
    rows: torch.Tensor
    """[total], int64, ascending"""
    counts: torch.Tensor
    """[n], int64"""

    @classmethod
    def select(cls, values: torch.Tensor, maxima: torch.Tensor, floor: torch.Tensor) -> Candidates:
        """Collect the tokens of `values` [n, padded vocab] that are at least `floor` [n], reading hot blocks only.

        maxima: `block_maxima(values)`. Every row must have a value that reaches its floor.
        """
        num_rows, num_blocks = maxima.shape
        hot = (maxima >= floor[:, None]).view(-1).nonzero()[:, 0]
        blocks = values.view(-1, BLOCK_LEN).index_select(0, hot)
        hot_row = hot // num_blocks
        reaches = blocks >= floor[hot_row][:, None]
        block, offset = reaches.nonzero(as_tuple=True)
        rows = hot_row[block]
        return cls(
            values=blocks[block, offset],
            token_ids=(hot % num_blocks)[block] * BLOCK_LEN + offset,
            rows=rows,
            counts=torch.bincount(rows, minlength=num_rows),
        )

    def sums(self) -> torch.Tensor:
        """The sum of each row's candidates [n], float64."""
        sums = torch.zeros(len(self.counts), dtype=torch.float64, device=self.values.device)
        return sums.index_add_(0, self.rows, self.values.double())

    def groups(self, padding: float) -> Iterator[CandidateGroup]:
        """The rows in a few groups of similar length, so that one long row does not pad all others."""
        counts = self.counts.tolist()
        order = sorted(range(len(counts)), key=counts.__getitem__)
        begin = 0
        while begin < len(order):
            limit = max(SMALL_GROUP_LEN, GROUP_GROWTH * counts[order[begin]])
            end = begin
            while end < len(order) and counts[order[end]] <= limit:
                end += 1
            yield self._group(order[begin:end], counts[order[end - 1]], padding)
            begin = end

    def _group(self, rows: list[int], length: int, padding: float) -> CandidateGroup:
        index = torch.tensor(rows, device=self.values.device)
        place = torch.arange(length, device=self.values.device)
        beyond = place >= self.counts[index][:, None]
        starts = self.counts.cumsum(0) - self.counts
        source = (starts[index][:, None] + place).masked_fill_(beyond, 0)
        values = self.values[source].masked_fill_(beyond, padding)
        return CandidateGroup(rows=index, values=values, token_ids=self.token_ids[source])
