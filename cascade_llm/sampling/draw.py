"""Drawing a token: one uniform number, the kept set of top_k, top_p and min_p, and the inverse CDF.

The CDF runs over the kept tokens in ascending order of token id. Which tokens are kept is decided in descending order
of probability, ties by ascending id: each filter keeps a prefix of that order, so the kept set is the shortest of the
prefixes. Every path through this file, filtered or not, candidates or the whole vocabulary, has these two orders.

Weights are float32 softmax probabilities, one softmax per row whatever else is in the batch; masses are summed in
float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cascade_llm.sampling.candidates import BLOCK_LEN, Candidates, block_maxima, kth_floor
from cascade_llm.sampling.workspace import Workspace

__all__ = [
    "Filters",
    "block_masses",
    "draw",
    "draw_from_logits",
    "draw_key",
    "draw_min_p",
    "draw_top_k",
    "draw_top_p",
    "kept_weights",
    "softmax_weights",
    "uniforms",
]

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK_64 = 2**64 - 1

BUCKET_SHIFT = 18
"""float32 bits that a bucket of the mass histogram ignores: 32 buckets to each power of two."""
NUM_BUCKETS = (0x3F800000 >> BUCKET_SHIFT) + 1
"""Buckets up to that of 1.0 and the little above it that a softmax may round to."""
SUM_SLACK = 1e-9
"""What the float64 sum of a row may differ by between two orders of summation, with room to spare."""
FEW_CANDIDATES = 64
"""How many of the most probable tokens are tried for top_p at first."""
SMALLEST_WEIGHT = 2.0**-126
"""The smallest normal float32. What is less probable is never drawn by a filtered row."""
LOWEST_TEMPERATURE = 1e-20
"""Below it float32 underflows; at it only exact ties of the maximum have weight already."""


def draw_key(seed: int, sample_index: int) -> int:
    """The key of one sequence's stream of uniform numbers, as a signed 64-bit integer."""
    mixed = _mix(_mix(seed) + GOLDEN_GAMMA * (sample_index + 1))
    return mixed - 2**64 if mixed >= 2**63 else mixed


def _mix(value: int) -> int:
    """SplitMix64's output function (Steele, Lea, Flood 2014; constants: Stafford's variant 13), on a host integer."""
    value &= MASK_64
    value = (value ^ (value >> 30)) * MIX_1 & MASK_64
    value = (value ^ (value >> 27)) * MIX_2 & MASK_64
    return value ^ (value >> 31)


def uniforms(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output number `position` of the streams `keys`: one uniform number in [0, 1), 53 bits.

    Args:
        keys: [n], int64, from `draw_key`
        positions: [n], int64, the place of the drawn token in its sequence

    Returns:
        [n], float64; a pure function of (key, position)
    """
    value = keys + (positions + 1) * _signed(GOLDEN_GAMMA)
    value = (value ^ _shift_right(value, 30)) * _signed(MIX_1)
    value = (value ^ _shift_right(value, 27)) * _signed(MIX_2)
    value = value ^ _shift_right(value, 31)
    return _shift_right(value, 11).to(torch.float64) * 2.0**-53


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's int64 shift copies the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True, slots=True)
class Filters:
    """What is kept before a draw, row by row, on the device."""

    top_k: torch.Tensor
    """[n], int64; the vocabulary's size or more keeps all"""
    top_p: torch.Tensor
    """[n], float64; 1 keeps all"""
    min_p: torch.Tensor
    """[n], float64; 0 keeps all"""

    def of(self, rows: torch.Tensor) -> Filters:
        """The filters of some rows."""
        return Filters(self.top_k[rows], self.top_p[rows], self.min_p[rows])


def softmax_weights(
    logits: torch.Tensor, row_maxima: torch.Tensor, temperature: torch.Tensor, workspace: Workspace
) -> torch.Tensor:
    """Probabilities at a temperature.

    Args:
        logits: [n, padded vocab], float32, no NaN and no +inf; changed
        row_maxima: [n], their finite maxima, taken off first so that a low temperature cannot overflow
        temperature: [n], above 0

    Returns:
        [n, padded vocab], float32, valid until the next call with this workspace
    """
    logits.sub_(row_maxima[:, None]).div_(temperature.float().clamp(min=LOWEST_TEMPERATURE)[:, None])
    weights = workspace.take("weights", tuple(logits.shape), dtype=torch.float32, device=logits.device)
    return torch.softmax(logits, -1, out=weights)


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse CDF over all tokens in order of id, first by block, then inside the block.

    Args:
        weights: [n, padded vocab], float32
        uniform: [n], float64, in [0, 1)

    Returns:
        [n], int64, tokens of positive weight
    """
    blocks = weights.view(weights.shape[0], -1, BLOCK_LEN)
    return _by_blocks(_block_sums(weights), uniform, lambda rows, block: blocks[rows, block])


def block_masses(logits: torch.Tensor, row_maxima: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """The sum of exp((logit - maximum) / temperature) over each block.

    Args:
        logits: [n, padded vocab], float32
        row_maxima: [n], float32
        temperature: [n]; 0 counts as the lowest there is

    Returns:
        [n, num_blocks], float32; NaN in rows that are not finite
    """
    blocks = logits.view(logits.shape[0], -1, BLOCK_LEN)
    return _scaled(blocks, row_maxima[:, None, None], temperature[:, None, None]).exp().sum(-1)


def draw_from_logits(
    logits: torch.Tensor,
    row_maxima: torch.Tensor,
    temperature: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """`draw` at a temperature without weights in memory: of each row, blocks are summed and one is worked out.

    Args:
        logits: [n, padded vocab], float32
        row_maxima: [n], float32
        temperature: [n]; 0 counts as the lowest there is
        uniform: [n], float64, in [0, 1)

    Returns:
        [n], int64; of rows that are not finite, any token
    """
    blocks = logits.view(logits.shape[0], -1, BLOCK_LEN)
    return _by_blocks(
        block_masses(logits, row_maxima, temperature),
        uniform,
        lambda rows, block: _scaled(blocks[rows, block], row_maxima[:, None], temperature[:, None]).exp(),
    )


def _scaled(logits: torch.Tensor, row_maxima: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    return (logits - row_maxima) / temperature.float().clamp(min=LOWEST_TEMPERATURE)


def _by_blocks(
    block_sums: torch.Tensor, uniform: torch.Tensor, weights_in: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Inverse CDF: the block that the uniform number falls into, then the token in it.

    Args:
        block_sums: [n, num_blocks], float32
        uniform: [n], float64
        weights_in: gives the weights [n, BLOCK_LEN] of a block of each row, from rows and blocks [n]
    """
    num_rows, num_blocks = block_sums.shape
    rows = torch.arange(num_rows, device=block_sums.device)
    cdf = block_sums.cumsum(-1, dtype=torch.float64)
    target = uniform * cdf[:, -1]
    block = (cdf <= target[:, None]).sum(-1).clamp(max=num_blocks - 1)  # more only where a row is not finite
    below = torch.where(block > 0, cdf[rows, block - 1], 0.0)
    inside = weights_in(rows, block)
    # Block sums are float32: the float64 sum of the last block may fall short of the target.
    last = torch.where(inside > 0, torch.arange(BLOCK_LEN, device=inside.device), 0).amax(-1)
    offset = (inside.cumsum(-1, dtype=torch.float64) <= (target - below)[:, None]).sum(-1)
    return block * BLOCK_LEN + torch.minimum(offset, last)


def draw_top_k(weights: torch.Tensor, uniform: torch.Tensor, filters: Filters, workspace: Workspace) -> torch.Tensor:
    """`draw` from what top_k keeps, then top_p, then min_p.

    Args:
        weights: [n, padded vocab], float32 probabilities
        uniform: [n], float64, in [0, 1)

    Returns:
        [n], int64
    """
    maxima = block_maxima(weights)
    largest_k = int(filters.top_k.max())
    if largest_k <= maxima.shape[1]:
        floor = kth_floor(maxima, filters.top_k, largest_k)
    else:
        ones = workspace.take("amounts", tuple(weights.shape), dtype=torch.float64, device=weights.device).fill_(1.0)
        floor = _bucket_floor(weights, ones, filters.top_k.double(), workspace)
    candidates = Candidates.select(weights, maxima, floor.clamp(min=SMALLEST_WEIGHT))
    return _draw_candidates(candidates, uniform, filters, None)


def draw_top_p(weights: torch.Tensor, uniform: torch.Tensor, filters: Filters, workspace: Workspace) -> torch.Tensor:
    """`draw` from what top_p keeps, then min_p; shapes as in `draw_top_k`.

    A few candidates hold the mass of most rows. The others are looked at again, with a floor found from a histogram.
    """
    maxima, mass = block_maxima(weights), _block_sums(weights).sum(-1, dtype=torch.float64)
    few = torch.full_like(filters.top_k, min(FEW_CANDIDATES, maxima.shape[1]))
    candidates = Candidates.select(weights, maxima, kth_floor(maxima, few, FEW_CANDIDATES).clamp(min=SMALLEST_WEIGHT))
    wanted = filters.top_p * mass
    token_ids = _draw_candidates(candidates, uniform, filters, mass)
    wide = (candidates.sums() < wanted + SUM_SLACK).nonzero()[:, 0]
    if len(wide):
        wide_shape = len(wide), weights.shape[1]
        wide_weights = workspace.take("wide", wide_shape, dtype=torch.float32, device=weights.device)
        torch.index_select(weights, 0, wide, out=wide_weights)
        amounts = workspace.take("amounts", wide_shape, dtype=torch.float64, device=weights.device)
        floor = _bucket_floor(wide_weights, amounts.copy_(wide_weights), wanted[wide], workspace)
        candidates = Candidates.select(wide_weights, maxima[wide], floor.clamp(min=SMALLEST_WEIGHT))
        token_ids[wide] = _draw_candidates(candidates, uniform[wide], filters.of(wide), mass[wide])
    return token_ids


def draw_min_p(weights: torch.Tensor, uniform: torch.Tensor, filters: Filters, workspace: Workspace) -> torch.Tensor:
    """`draw` from what min_p keeps; shapes as in `draw_top_k`."""
    maxima = block_maxima(weights)
    floor = (maxima.amax(-1).double() * filters.min_p).float()
    candidates = Candidates.select(weights, maxima, floor.clamp(min=SMALLEST_WEIGHT))
    return _draw_candidates(candidates, uniform, filters, None)


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    return weights.view(weights.shape[0], -1, BLOCK_LEN).sum(-1)


def _bucket_floor(
    weights: torch.Tensor, amounts: torch.Tensor, wanted: torch.Tensor, workspace: Workspace
) -> torch.Tensor:
    """A weight such that the tokens that reach it sum to `wanted` for certain.

    A bucket holds weights of equal leading bits (floats that are not negative are ordered as their bits are); the
    answer is the lower edge of the bucket in which the sum from the top reaches what is wanted.

    Args:
        weights: [n, padded vocab], float32
        amounts: [n, padded vocab], float64, what each token adds to the sum
        wanted: [n], float64

    Returns:
        [n], float32
    """
    shape, device = tuple(weights.shape), weights.device
    leading = workspace.take("leading_bits", shape, dtype=torch.int32, device=device)
    torch.bitwise_right_shift(weights.view(torch.int32), BUCKET_SHIFT, out=leading)
    buckets = workspace.take("buckets", shape, dtype=torch.int64, device=device).copy_(leading)
    sums = amounts.new_zeros(shape[0], NUM_BUCKETS).scatter_add_(1, buckets, amounts)
    num_above = (sums.flip(-1).cumsum(-1) < (wanted + SUM_SLACK)[:, None]).sum(-1)
    bucket = (NUM_BUCKETS - 1 - num_above).clamp(min=0)
    return (bucket.int() << BUCKET_SHIFT).view(torch.float32)


def _draw_candidates(
    candidates: Candidates, uniform: torch.Tensor, filters: Filters, mass: torch.Tensor | None
) -> torch.Tensor:
    """Filter each row's candidates exactly and draw by inverse CDF in order of id: [n], int64."""
    token_ids = torch.empty(len(uniform), dtype=torch.int64, device=uniform.device)
    for group in candidates.groups(padding=0.0):
        kept = kept_weights(group.values, filters.of(group.rows), None if mass is None else mass[group.rows])
        cdf = kept.cumsum(-1)
        place = (cdf <= (uniform[group.rows] * cdf[:, -1])[:, None]).sum(-1, keepdim=True)
        token_ids[group.rows] = group.token_ids.gather(1, place)[:, 0]
    return token_ids


def kept_weights(weights: torch.Tensor, filters: Filters, mass: torch.Tensor | None) -> torch.Tensor:
    """Zero the candidates that a filter drops.

    Args:
        weights: [r, c], float32, in ascending order of token id, with all tokens that the filters keep
        mass: [r], float64, of all the row's tokens; None where top_p is a share of what top_k keeps

    Returns:
        [r, c], float64
    """
    descending = weights.double().sort(-1, descending=True).values
    num_kept = _num_kept(descending, filters, mass)
    threshold = descending.gather(1, (num_kept - 1)[:, None])
    num_ties_kept = num_kept - (descending > threshold).sum(-1)
    exact = weights.double()
    ties = exact == threshold
    kept = (exact > threshold) | (ties & (ties.cumsum(-1) <= num_ties_kept[:, None]))
    return exact.masked_fill_(~kept, 0.0)


def _num_kept(descending: torch.Tensor, filters: Filters, mass: torch.Tensor | None) -> torch.Tensor:
    """How many of the most probable tokens are kept [r], at least 1: the shortest prefix of the three filters."""
    length = descending.shape[1]
    top_k = filters.top_k.clamp(max=length)
    from_top = descending.cumsum(-1)
    if mass is None:
        mass = from_top.gather(1, (top_k - 1)[:, None])[:, 0]
    top_p = (from_top < (filters.top_p * mass)[:, None]).sum(-1) + 1
    top_p = torch.where(filters.top_p < 1.0, top_p, length)
    min_p = (descending >= (filters.min_p * descending[:, 0])[:, None]).sum(-1)
    return torch.minimum(torch.minimum(top_k, top_p), min_p).clamp(max=length)
