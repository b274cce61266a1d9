"""Decoder layers and the blocks that they are composed of, each with the names of its tensors in a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from cascade_llm.attention.backend import Attention
from cascade_llm.config import ModelConfig
from cascade_llm.layers.fused_ops import FusedOps, HeadLayout, RMSNorm
from cascade_llm.layers.rope import Rotation
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightOptions
from cascade_llm.weights.linear import Linear

__all__ = [
    "MLP",
    "AttentionBlock",
    "BlockOptions",
    "DecoderLayer",
    "GatedMLP",
    "Parameter",
    "PreNormLayer",
    "below",
    "linear_parameters",
    "norm_parameter",
]


@dataclass(frozen=True)
class Parameter:
    """Where one tensor of a checkpoint goes."""

    shape: tuple[int, ...]
    """That it must have."""
    load: Callable[[StoredTensor], None]
    """Takes its values, and converts their dtype."""


@dataclass(frozen=True)
class BlockOptions:
    """What every block of a model is made from."""

    config: ModelConfig
    weights: WeightOptions
    ops: FusedOps

    def linear(self, name: str, in_features: int, parts: Mapping[str, int], *, bias: bool) -> Linear:
        """A layer whose matrix is fused of `parts`: the name of each in a checkpoint, and its outputs."""
        return Linear(MatrixSpec(name, in_features, parts, self.weights), bias=bias)

    def norm(self, size: int) -> RMSNorm:
        """A norm over `size` values that only scales, until its weight is loaded."""
        return RMSNorm.ones(size, self.config.rms_norm_eps, dtype=self.weights.dtype, device=self.weights.device)


class AttentionBlock:
    """The projections to and from heads; the attention between them is not its own.

    A checkpoint calls the parts `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `q_norm`, `k_norm`.
    """

    def __init__(
        self, options: BlockOptions, *, qkv_bias: bool = False, out_bias: bool = False, head_norms: bool = False
    ) -> None:
        """`head_norms`: whether each query and each key head is normalised before it is rotated."""
        config, self._ops = options.config, options.ops
        self._layout = HeadLayout(config.num_qo_heads, config.num_kv_heads, config.head_dim)
        q_size, kv_size = config.num_qo_heads * config.head_dim, config.num_kv_heads * config.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv = options.linear("qkv", config.hidden_size, parts, bias=qkv_bias)
        self.out = options.linear("attention_out", q_size, {"o_proj": config.hidden_size}, bias=out_bias)
        self.head_norms = (options.norm(config.head_dim), options.norm(config.head_dim)) if head_norms else None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order they run."""
        return self.qkv, self.out

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The names of its tensors, and where they go."""
        for linear in self.linears:
            yield from linear_parameters(linear)
        if self.head_norms is not None:
            yield "q_norm.weight", norm_parameter(self.head_norms[0])
            yield "k_norm.weight", norm_parameter(self.head_norms[1])

    def project(self, x: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Heads of x [rows, hidden]: q [rows, num_qo_heads, head_dim], k and v [rows, num_kv_heads, head_dim]."""
        return self._ops.rotate(self.qkv(x), self._layout, rotation, self.head_norms)

    def merge_heads(self, attended: torch.Tensor) -> torch.Tensor:
        """[rows, num_qo_heads, head_dim] -> [rows, hidden]."""
        return self.out(attended.flatten(1))


class MLP(ABC):
    """What a layer does to each row alone: one gated product, or several of which a router chooses."""

    @property
    @abstractmethod
    def linears(self) -> tuple[Linear, ...]:
        """In the order they run."""

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The names of its tensors, and where they go."""

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden]."""


class GatedMLP(MLP):
    """down(silu(gate(x)) * up(x)); a checkpoint calls the parts `gate_proj`, `up_proj` and `down_proj`."""

    def __init__(self, options: BlockOptions, *, bias: bool = False) -> None:
        self._ops = options.ops
        hidden, inner = options.config.hidden_size, options.config.intermediate_size
        self.gate_up = options.linear("gate_up", hidden, {"gate_proj": inner, "up_proj": inner}, bias=bias)
        self.down = options.linear("down", inner, {"down_proj": hidden}, bias=bias)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """See `MLP`."""
        return self.gate_up, self.down

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """See `MLP`."""
        for linear in self.linears:
            yield from linear_parameters(linear)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `MLP`."""
        return self.down(self._ops.silu_and_mul(self.gate_up(x)))


class DecoderLayer(ABC):
    """Attention and a feed-forward block, in two pieces: what comes before attention, and what comes after.

    CUDA graphs of mixed steps are captured piece by piece, and attention runs between them.
    """

    def __init__(self, index: int, attention: AttentionBlock, mlp: MLP) -> None:
        self.index, self.attention, self.mlp = index, attention, mlp

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order they run."""
        return *self.attention.linears, *self.mlp.linears

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The names of its tensors below the layer's own, and where they go."""

    @abstractmethod
    def before_attention(
        self, residual: torch.Tensor, delta: torch.Tensor | None, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [rows, num_qo_heads, head_dim], k and v [rows, num_kv_heads, head_dim].

        Args:
            residual: [rows, hidden]; `delta` is added in place
            delta: [rows, hidden], what the layer before left to add; None for the first layer
            rotation: of these rows
        """

    @abstractmethod
    def after_attention(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What is left to add, [rows, hidden], after attention's output [rows, num_qo_heads, head_dim]."""

    def __call__(
        self, residual: torch.Tensor, delta: torch.Tensor | None, rotation: Rotation, attention: Attention
    ) -> torch.Tensor:
        """What this layer adds to the residual stream at its end, [rows, hidden]; adding it is left to the next norm.

        Args:
            residual: [rows, hidden]; `delta` and the attention's output are added in place
            delta: [rows, hidden], what the layer before left to add; None for the first layer
            rotation: of these rows
            attention: over this step's rows
        """
        q, k, v = self.before_attention(residual, delta, rotation)
        return self.after_attention(residual, attention(self.index, q, k, v))


class PreNormLayer(DecoderLayer):
    """Each block reads the normalised residual stream, and its output is added to the stream."""

    def __init__(self, options: BlockOptions, index: int, attention: AttentionBlock, mlp: MLP) -> None:
        super().__init__(index, attention, mlp)
        self._ops = options.ops
        hidden = options.config.hidden_size
        self.attention_norm, self.mlp_norm = options.norm(hidden), options.norm(hidden)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """See `DecoderLayer`."""
        yield "input_layernorm.weight", norm_parameter(self.attention_norm)
        yield "post_attention_layernorm.weight", norm_parameter(self.mlp_norm)
        yield from below("self_attn", self.attention.named_parameters())
        yield from below("mlp", self.mlp.named_parameters())

    def before_attention(
        self, residual: torch.Tensor, delta: torch.Tensor | None, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `DecoderLayer`."""
        if delta is None:
            x = self._ops.rms_norm(residual, self.attention_norm)
        else:
            x = self._ops.add_rms_norm(residual, delta, self.attention_norm)
        return self.attention.project(x, rotation)

    def after_attention(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """See `DecoderLayer`."""
        delta = self.attention.merge_heads(attended)
        return self.mlp(self._ops.add_rms_norm(residual, delta, self.mlp_norm))


def linear_parameters(linear: Linear) -> Iterator[tuple[str, Parameter]]:
    """`PART.weight` and `PART.bias` of each part."""
    for part, rows in linear.spec.parts.items():
        yield f"{part}.weight", Parameter((rows, linear.spec.in_features), partial(linear.load, part))
        if linear.bias is not None:
            yield f"{part}.bias", Parameter((rows,), partial(linear.load_bias, part))


def norm_parameter(norm: RMSNorm) -> Parameter:
    """The weight of a norm."""
    return Parameter(tuple(norm.weight.shape), partial(_copy, norm.weight))


def below(prefix: str, parameters: Iterator[tuple[str, Parameter]]) -> Iterator[tuple[str, Parameter]]:
    """The same parameters, their names behind `prefix` and a dot."""
    return ((f"{prefix}.{name}", parameter) for name, parameter in parameters)


def _copy(weight: torch.Tensor, stored: StoredTensor) -> None:
    weight.copy_(stored.values())
