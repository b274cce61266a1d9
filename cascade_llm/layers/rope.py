"""Rotary position embedding (Su et al. 2021), as a table over positions, and the ways to stretch it.

One row of the table is a function of the position alone. That lets sequences of any length share pages: a key is
stored rotated, so its rotation must not depend on who reads it.

For `dynamic` (NTK by the sequence's length, "NTK-aware scaled RoPE" of 2023) the row of position p uses the
frequencies of a sequence of p + 1 tokens. Up to `max_position_embeddings` that is plain RoPE. Beyond, it is what
transformers computes when it decodes token by token with a KV cache; a prompt longer than `max_position_embeddings`
is rotated by transformers with its final length throughout, and here token by token.

For `longrope` (Ding et al. 2024) one of two lists of factors serves all positions, so that a table's length chooses it:
the short ones up to the length that the model was first trained on, else the long ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch

from cascade_llm.config import ModelConfig, RopeConfig

__all__ = [
    "ROPE_TYPES",
    "RotaryTables",
    "Rotation",
    "max_context_len",
    "rope_frequencies",
    "rotate_heads",
]

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_frequencies(
    rope: RopeConfig, rotary_dim: int, max_position_embeddings: int, context_len: int | None = None
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [rotary_dim / 2], float32, and the factor that cos and sin are multiplied by.

    Args:
        rope: theta and scaling
        rotary_dim: dimensions that are rotated
        max_position_embeddings: what `dynamic` scales from
        context_len: length of the longest sequence, read by `dynamic` and `longrope`; None is the one that the model
            was trained on before it was stretched
    """
    if rope.rope_type == "dynamic":
        lengths = torch.tensor([max(context_len or 0, max_position_embeddings)])
        return _dynamic_frequencies(rope, rotary_dim, max_position_embeddings, lengths)[0], 1.0
    plain = 1.0 / _wave_scales(rope.theta, rotary_dim)
    match rope.rope_type:
        case "default":
            return plain, 1.0
        case "linear":
            return plain / rope.factor, 1.0
        case "llama3":
            return _llama3_frequencies(rope, plain, _original_len(rope, max_position_embeddings)), 1.0
        case "yarn":
            frequencies = _yarn_frequencies(rope, rotary_dim, _original_len(rope, max_position_embeddings))
            return frequencies, yarn_attention_factor(rope)
        case "longrope":
            original_len = _original_len(rope, max_position_embeddings)
            factors = rope.long_factors if (context_len or 0) > original_len else rope.short_factors
            scale = _longrope_attention_factor(rope, original_len)
            return 1.0 / (torch.tensor(factors) * _wave_scales(rope.theta, rotary_dim)), scale
    raise AssertionError(f"rope type {rope.rope_type!r} was to be refused when the configuration was read")


def _cos_sin_cache(
    rope: RopeConfig, config: ModelConfig, max_positions: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """[max_positions, rotary_dim] float32, rotary_dim / 2 cosines then as many sines: FlashInfer's `cos_sin_cache`."""
    rotary_dim, original = rope.rotary_dim or config.head_dim, config.max_position_embeddings
    positions = torch.arange(max_positions)
    if rope.rope_type == "dynamic":
        frequencies = _dynamic_frequencies(rope, rotary_dim, original, (positions + 1).clamp(min=original))
        scale = 1.0
    else:
        frequencies, scale = rope_frequencies(rope, rotary_dim, original, max_positions)
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


def _longrope_attention_factor(rope: RopeConfig, original_len: int) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return math.sqrt(1 + math.log(rope.factor) / math.log(original_len)) if rope.factor > 1 else 1.0


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
    """Cosines and sines of one step's rows; made once per step, used in every layer that rotates alike."""

    def __init__(self, cos_sin: torch.Tensor, *, is_interleaved: bool = False) -> None:
        self.cos_sin = cos_sin
        """[rows, rotary_dim] float32: rows of the table."""
        self.is_interleaved = is_interleaved
        """Whether neighbouring dimensions are rotated against each other, and not the two halves."""

    @cached_property
    def cos(self) -> torch.Tensor:
        """[rows, 1, rotary_dim], each twice: once for either of the two dimensions that it rotates."""
        cos, _ = self.cos_sin.unsqueeze(1).chunk(2, dim=-1)
        return cos.repeat_interleave(2, dim=-1) if self.is_interleaved else torch.cat((cos, cos), dim=-1)

    @cached_property
    def signed_sin(self) -> torch.Tensor:
        """[rows, 1, rotary_dim], as `cos`, negated for the first of the two."""
        _, sin = self.cos_sin.unsqueeze(1).chunk(2, dim=-1)
        return torch.stack((-sin, sin), dim=-1).flatten(-2) if self.is_interleaved else torch.cat((-sin, sin), dim=-1)


class RotaryTables:
    """What every layer of a model is rotated by: a table for each of the ways in which they are."""

    def __init__(self, config: ModelConfig, max_positions: int, device: torch.device | str = "cpu") -> None:
        """`max_positions`: the longest sequence."""
        ropes = [config.rope_of(layer) for layer in range(config.num_layers)]
        self._distinct = list(dict.fromkeys(rope for rope in ropes if rope is not None))
        self._of_layer = [None if rope is None else self._distinct.index(rope) for rope in ropes]
        self.tables = [_cos_sin_cache(rope, config, max_positions, device) for rope in self._distinct]
        """Each [max_positions, rotary_dim] float32."""

    def rows_at(self, positions: torch.Tensor) -> list[torch.Tensor]:
        """Of each table the rows [rows, rotary_dim] at int64 `positions` [rows], which must lie inside it."""
        return [table.index_select(0, positions) for table in self.tables]

    def by_layer(self, rows: Sequence[torch.Tensor]) -> list[Rotation | None]:
        """The rotation of each layer, None where there is none, from the rows of each table."""
        rotations = [
            Rotation(found, is_interleaved=rope.is_interleaved)
            for rope, found in zip(self._distinct, rows, strict=True)
        ]
        return [None if index is None else rotations[index] for index in self._of_layer]


def rotate_heads(heads: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotated copy of [rows, num_heads, head_dim], computed in float32; dimensions behind the rotated stay."""
    rotary_dim = rotation.cos_sin.shape[-1]
    exact = heads[..., :rotary_dim].float()
    if rotation.is_interleaved:
        swapped = exact.view(*exact.shape[:-1], -1, 2).flip(-1).flatten(-2)
    else:
        swapped = exact.roll(rotary_dim // 2, dims=-1)
    rotated = (exact * rotation.cos).addcmul_(swapped, rotation.signed_sin).to(heads.dtype)
    return rotated if rotary_dim == heads.shape[-1] else torch.cat((rotated, heads[..., rotary_dim:]), dim=-1)
