"""Rotary position embedding (Su et al. 2021), as a table over positions, and the ways to stretch it.

One row of the table is a function of the position alone. That lets sequences of any length share pages: a key is
stored rotated, so its rotation must not depend on who reads it.

For `dynamic` (NTK by the sequence's length, "NTK-aware scaled RoPE" of 2023) the row of position p uses the
frequencies of a sequence of p + 1 tokens. Up to `max_position_embeddings` that is plain RoPE. Beyond, it is what
transformers computes when it decodes token by token with a KV cache; a prompt longer than `max_position_embeddings`
is rotated by transformers with its final length throughout, and here token by token.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch

from cascade_llm.config import ModelConfig, RopeConfig

__all__ = [
    "ROPE_TYPES",
    "Rotation",
    "cos_sin_cache",
    "max_context_len",
    "rope_frequencies",
    "rotate_heads",
    "rotation_at",
]

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_frequencies(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int, context_len: int | None = None
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [head_dim / 2], float32, and the factor that cos and sin are multiplied by.

    Args:
        rope: theta and scaling
        head_dim: dimensions that are rotated
        max_position_embeddings: what `dynamic` scales from
        context_len: length of the sequence, read by `dynamic` only; None is `max_position_embeddings`
    """
    if rope.rope_type == "dynamic":
        lengths = torch.tensor([max(context_len or 0, max_position_embeddings)])
        return _dynamic_frequencies(rope, head_dim, max_position_embeddings, lengths)[0], 1.0
    plain = 1.0 / _wave_scales(rope.theta, head_dim)
    match rope.rope_type:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / rope.factor, 1.0
        case "llama3":
            return _llama3_frequencies(rope, plain, _original_len(rope, max_position_embeddings)), 1.0
        case "yarn":
            frequencies = _yarn_frequencies(rope, head_dim, _original_len(rope, max_position_embeddings))
            return frequencies, yarn_attention_factor(rope)
    raise AssertionError(f"rope type {rope.rope_type!r} was to be refused when the configuration was read")


def cos_sin_cache(config: ModelConfig, max_positions: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """[max_positions, head_dim] float32, head_dim / 2 cosines then as many sines: FlashInfer's `cos_sin_cache`."""
    rope, head_dim, original = config.rope, config.head_dim, config.max_position_embeddings
    positions = torch.arange(max_positions)
    if rope.rope_type == "dynamic":
        frequencies = _dynamic_frequencies(rope, head_dim, original, (positions + 1).clamp(min=original))
        scale = 1.0
    else:
        frequencies, scale = rope_frequencies(rope, head_dim, original)
    angles = positions[:, None].float() * frequencies
    return (torch.cat((angles.cos(), angles.sin()), dim=-1) * scale).to(device)


def max_context_len(config: ModelConfig) -> int:
    """The longest sequence that the embedding is stretched to: what the configuration says, or its scaling."""
    rope, stated = config.rope, config.max_position_embeddings
    if rope.rope_type == "yarn":
        return max(stated, int(_original_len(rope, stated) * rope.factor))
    return int(stated * rope.factor) if rope.rope_type == "dynamic" else stated


def yarn_attention_factor(rope: RopeConfig) -> float:
    """What YaRN multiplies cos and sin by, as given or inferred from the scaling factor."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)


def _original_len(rope: RopeConfig, max_position_embeddings: int) -> int:
    return rope.original_max_position_embeddings or max_position_embeddings


def _wave_scales(theta: float, head_dim: int) -> torch.Tensor:
    """theta^(2i / head_dim), [head_dim / 2]."""
    exponents: torch.Tensor = torch.arange(0, head_dim, 2).float() / head_dim
    return theta**exponents


def _dynamic_frequencies(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int, lengths: torch.Tensor
) -> torch.Tensor:
    """[lengths, head_dim / 2]: theta grows with the length of the sequence."""
    stretch = rope.factor * lengths.double() / max_position_embeddings - (rope.factor - 1)
    thetas = rope.theta * stretch ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    return 1.0 / thetas.float()[:, None] ** exponents


def _llama3_frequencies(rope: RopeConfig, plain: torch.Tensor, original_len: int) -> torch.Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated (Llama 3.1)."""
    turns = original_len * plain / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn_frequencies(rope: RopeConfig, head_dim: int, original_len: int) -> torch.Tensor:
    """Interpolation of long waves, extrapolation of short ones, a linear ramp between (Peng et al. 2023)."""

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(original_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - low) / ((high - low) or 0.001)
    extrapolated = 1 - ramp.clamp(0, 1)
    scales = _wave_scales(rope.theta, head_dim)
    return (1 - extrapolated) / (rope.factor * scales) + extrapolated / scales


class Rotation:
    """Cosines and sines of one step's rows; made once per step, used in every layer."""

    def __init__(self, cos_sin: torch.Tensor) -> None:
        self.cos_sin = cos_sin
        """[rows, head_dim] float32: rows of the table."""

    @cached_property
    def cos(self) -> torch.Tensor:
        """[rows, 1, head_dim], both halves alike."""
        cos, _ = self.cos_sin.unsqueeze(1).chunk(2, dim=-1)
        return torch.cat((cos, cos), dim=-1)

    @cached_property
    def signed_sin(self) -> torch.Tensor:
        """[rows, 1, head_dim], the first half negated."""
        _, sin = self.cos_sin.unsqueeze(1).chunk(2, dim=-1)
        return torch.cat((-sin, sin), dim=-1)


def rotation_at(table: torch.Tensor, positions: torch.Tensor) -> Rotation:
    """The rotation of rows at int64 `positions` [rows], which must lie inside the table."""
    return Rotation(table.index_select(0, positions))


def rotate_heads(heads: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotated copy of [rows, num_heads, head_dim], computed in float32 (NeoX style: halves, not pairs)."""
    exact = heads.float()
    swapped = exact.roll(heads.shape[-1] // 2, dims=-1)
    return (exact * rotation.cos).addcmul_(swapped, rotation.signed_sin).to(heads.dtype)
