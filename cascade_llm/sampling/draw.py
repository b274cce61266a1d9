"""Drawing a token: one uniform number, the kept set of top_k, top_p and min_p, and the inverse CDF.

The CDF runs over the kept tokens in ascending order of token id. Which tokens are kept is decided in descending order
of probability, ties by ascending id: each filter keeps a prefix of that order, so the kept set is the shortest of the
prefixes. Weights are float32 softmax probabilities; masses are summed in float64.

A CUDA graph can hold every function on tensors here: no size depends on values, and the host reads nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = [
    "BLOCK_LEN",
    "Filters",
    "draw",
    "draw_key",
    "first_largest",
    "keep",
    "softmax_weights",
    "uniforms",
]

BLOCK_LEN = 128
"""Tokens per partial sum: prefix sums over blocks, then inside one, are fast on a GPU where one over a row is not."""
LOWEST_TEMPERATURE = 1e-20
"""Below it float32 underflows; at it only exact ties of the maximum have weight already."""

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK_64 = 2**64 - 1


def draw_key(seed: int, sample_index: int) -> int:
    """The key of one sequence's stream of uniform numbers, as a signed 64-bit integer."""
    return _signed(_mix(_mix(seed) + GOLDEN_GAMMA * (sample_index + 1)))


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


def first_largest(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest index of each row's maximum, and the maximum; on a CPU several times as fast as `torch.max`.

    Args:
        values: [n, whole blocks], float32

    Returns:
        indices [n], int64; maxima [n], float32, NaN where the row holds one
    """
    blocks = values.view(len(values), -1, BLOCK_LEN)
    maxima, block = blocks.amax(-1).max(-1, keepdim=True)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK_LEN))[:, 0]
    return block[:, 0] * BLOCK_LEN + inside.argmax(-1), maxima[:, 0]


def softmax_weights(logits: torch.Tensor, row_maxima: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Probabilities at a temperature.

    Args:
        logits: [n, padded vocab], float32; changed
        row_maxima: [n], float32, taken off first so that a low temperature cannot overflow
        temperature: [n], float64; 0 counts as the lowest there is

    Returns:
        [n, padded vocab], float32; NaN in rows that are not finite
    """
    logits.sub_(row_maxima[:, None]).div_(temperature.float().clamp(min=LOWEST_TEMPERATURE)[:, None])
    return torch.softmax(logits, -1)


def keep(weights: torch.Tensor, filters: Filters) -> torch.Tensor:
    """Weights of the tokens that top_k, then top_p, then min_p keep; 0 for the others.

    Args:
        weights: [n, padded vocab], float32 probabilities

    Returns:
        [n, padded vocab], float32; at least one token of each row is kept
    """
    descending, token_ids = torch.sort(weights, dim=-1, descending=True, stable=True)
    rank = torch.arange(weights.shape[1], device=weights.device)
    kept = torch.where(rank < filters.top_k.clamp(min=1)[:, None], descending, 0.0)
    last = torch.where(filters.top_p < 1.0, _first_prefix(kept, filters.top_p, torch.lt), weights.shape[1])
    least = filters.min_p * descending[:, 0].double()
    kept = torch.where((rank <= last[:, None]) & (descending >= least[:, None]), kept, 0.0)
    return torch.zeros_like(weights).scatter_(1, token_ids, kept)


def draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Inverse CDF over all tokens in order of id.

    Args:
        weights: [n, padded vocab], float32
        uniform: [n], float64, in [0, 1)

    Returns:
        [n], int64, tokens of positive weight; any token of rows that are not finite
    """
    return _first_prefix(weights, uniform, torch.le)


def _first_prefix(
    weights: torch.Tensor, share: torch.Tensor, is_short: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The end of the first prefix of each row whose sum is not short of a share of the row's sum.

    The block in which the prefix ends is found first, then the place in it.

    Args:
        weights: [n, whole blocks], float32
        share: [n], float64, from 0 to 1
        is_short: compares the sums of prefixes with the share: less, or at most

    Returns:
        [n], int64, the index of a positive weight
    """
    blocks = weights.view(len(weights), -1, BLOCK_LEN)
    sums = blocks.sum(-1, dtype=torch.float64)
    ends = sums.cumsum(-1)
    total = ends[:, -1:]
    target = torch.minimum(share[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    block = is_short(ends, target).sum(-1, keepdim=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK_LEN))[:, 0]
    offset = is_short(before + inside.cumsum(-1, dtype=torch.float64), target).sum(-1)
    places = torch.arange(BLOCK_LEN, device=weights.device)
    last_positive = torch.where(inside > 0, places, 0).amax(-1)  # rounding may leave the block's prefix sums short
    return block[:, 0] * BLOCK_LEN + torch.minimum(offset, last_positive)
