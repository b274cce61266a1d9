"""Decoder layers and the blocks that they are composed of, each with the names of its tensors in a checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from cascade_llm.attention.backend import Attention
from cascade_llm.attention.head_shares import HeadShares
from cascade_llm.config import ModelConfig
from cascade_llm.device.ranks import Ranks, Share
from cascade_llm.layers.fused_ops import FusedOps, HeadLayout, RMSNorm
from cascade_llm.layers.rope import Rotation
from cascade_llm.layers.routing import Router
from cascade_llm.layers.shared_norms import shared_rms_norms
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightOptions
from cascade_llm.weights.linear import Linear
from cascade_llm.weights.stacked_linear import StackedLinear

__all__ = [
    "MLP",
    "PRE_NORM",
    "AttentionBlock",
    "BlockOptions",
    "DecoderLayer",
    "GatedMLP",
    "NormNames",
    "Parameter",
    "below",
    "linear_parameters",
    "norm_parameter",
]

BLOCK_LENS = (256, 128, 64, 32)
"""Inputs of a block of weights, in any format that has blocks."""

ROWS_AT_ONCE = 1024
"""Of a gated product on the CPU. The inner values of 8,192 rows are the most that a step holds: 0.15 GB for
a hidden size of 576, 1.4 GB for one of 4,096."""


@dataclass(frozen=True)
class Parameter:
    """Where one tensor of a checkpoint goes."""

    shape: tuple[int, ...]
    """That it must have."""
    load: Callable[[StoredTensor], None]
    """Takes its values, and converts their dtype."""
    stands_for: tuple[str, ...] = ()
    """Names of the parameters that it gives values to together, such as all matrices of a stack: a checkpoint has this
    one or those."""


@dataclass(frozen=True)
class BlockOptions:
    """What every block of a model is made from."""

    config: ModelConfig
    weights: WeightOptions
    ops: FusedOps
    router: Router
    ranks: Ranks = field(default_factory=Ranks)
    """That share the heads, and the inner values of feed-forward blocks."""

    def linear(
        self,
        name: str,
        in_features: int,
        parts: Mapping[str, int],
        *,
        bias: bool,
        inputs: Share | None = None,
        outputs: Mapping[str, Share] | None = None,
    ) -> Linear:
        """A layer with a matrix.

        Args:
            name: what messages call it
            in_features: of the whole matrix
            parts: that it is fused of: the name of each in a checkpoint, and its outputs
            bias: whether it has one
            inputs: this rank's; its products are summed over all ranks. None: each rank has all
            outputs: this rank's of each part; None: each rank has all
        """
        return Linear(self._spec(name, in_features, parts, inputs, outputs), bias=bias, ranks=self.ranks)

    @property
    def heads(self) -> HeadShares:
        """This rank's."""
        return HeadShares.of(self.config, self.ranks)

    def inner_share(self, size: int) -> Share:
        """This rank's part of the values between two products, cut where long blocks of weights end.

        Long blocks are given up where one rank would have much more to do than another.
        """
        fits = (unit for unit in BLOCK_LENS if size % unit == 0 and _is_even(size // unit, self.ranks.count))
        return self.ranks.share(size, next(fits, 1))

    def exact_linear(self, name: str, in_features: int, parts: Mapping[str, int], *, bias: bool) -> Linear:
        """As `linear`, of a small matrix whose plain values are not rounded when the others are quantized."""
        exact = replace(self, weights=replace(self.weights, quantization=None))
        return exact.linear(name, in_features, parts, bias=bias)

    def stacked(
        self,
        name: str,
        in_features: int,
        parts: Mapping[str, int],
        num_matrices: int,
        *,
        bias: bool,
        inputs: Share | None = None,
        outputs: Mapping[str, Share] | None = None,
    ) -> StackedLinear:
        """As `linear`, of as many matrices of one shape; each row of a product meets one.

        Products of some inputs are not summed over ranks: whoever asks for them does that once for all experts.
        """
        spec = self._spec(name, in_features, parts, inputs, outputs)
        return StackedLinear(spec, num_matrices, bias=bias, ranks=self.ranks)

    def _spec(
        self,
        name: str,
        in_features: int,
        parts: Mapping[str, int],
        inputs: Share | None,
        outputs: Mapping[str, Share] | None,
    ) -> MatrixSpec:
        if self.ranks.count == 1:
            inputs = outputs = None
        return MatrixSpec(name, in_features, parts, self.weights, inputs, outputs or {})

    def norm(self, size: int) -> RMSNorm:
        """A norm over `size` values that only scales, until its weight is loaded."""
        config, weights = self.config, self.weights
        return RMSNorm.ones(
            size, config.rms_norm_eps, dtype=weights.dtype, device=weights.device, offset=config.norm_offset
        )


class AttentionBlock:
    """The projections to and from heads; the attention between them is not its own.

    A checkpoint calls the parts `q_proj`, `k_proj`, `v_proj`, `o_proj`, and `q_norm`, `k_norm`.
    """

    def __init__(
        self,
        options: BlockOptions,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norms: bool = False,
        projection_norms: bool = False,
        sinks: bool = False,
        fused_name: str | None = None,
    ) -> None:
        """Without values.

        Args:
            options: of the model
            qkv_bias: whether q, k and v have one
            out_bias: whether the projection back has one
            head_norms: whether each query and each key head is normalised before it is rotated
            projection_norms: whether all queries together, and all keys, are normalised before they are rotated
            sinks: whether each query head has a score that takes a share of the softmax and gives nothing
            fused_name: what a checkpoint calls the one tensor that it has in the place of q, k and v
        """
        config, heads, self._ops, self._fused_name = options.config, options.heads, options.ops, fused_name
        self._layout = HeadLayout(heads.qo.size, heads.kv.size, config.head_dim)
        q, kv = heads.qo.times(config.head_dim), heads.kv.times(config.head_dim)
        shares = {"q_proj": q, "k_proj": kv, "v_proj": kv}
        parts = {part: share.total for part, share in shares.items()}
        self.qkv = options.linear("qkv", config.hidden_size, parts, bias=qkv_bias, outputs=shares)
        self.out = options.linear("attention_out", q.total, {"o_proj": config.hidden_size}, bias=out_bias, inputs=q)
        self.head_norms = (options.norm(config.head_dim), options.norm(config.head_dim)) if head_norms else None
        self.projection_norms = (options.norm(q.size), options.norm(kv.size)) if projection_norms else None
        self._shares, self._ranks, self._heads = (q, kv), options.ranks, heads.qo
        device = options.weights.device
        self.sinks = torch.zeros(heads.qo.size, dtype=torch.float32, device=device) if sinks else None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """In the order they run."""
        return self.qkv, self.out

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The names of its tensors, and where they go."""
        yield from linear_parameters(self.qkv, self._fused_name)
        yield from linear_parameters(self.out)
        if self.head_norms is not None:
            yield "q_norm.weight", norm_parameter(self.head_norms[0])
            yield "k_norm.weight", norm_parameter(self.head_norms[1])
        if self.projection_norms is not None:
            yield "q_norm.weight", norm_parameter(self.projection_norms[0], self._shares[0])
            yield "k_norm.weight", norm_parameter(self.projection_norms[1], self._shares[1])
        if self.sinks is not None:
            yield "sinks", Parameter((self._heads.total,), partial(_copy_part, self.sinks, self._heads))

    def project(self, x: torch.Tensor, rotation: Rotation | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Heads of x [rows, hidden]: q [rows, num_qo_heads, head_dim], k and v [rows, num_kv_heads, head_dim]."""
        qkv = self.qkv(x)
        if self.projection_norms is not None:
            parts = [qkv[:, self.qkv.held.rows_of(part)] for part in ("q_proj", "k_proj")]
            for part, normed in zip(
                parts, shared_rms_norms(self._ops, self._ranks, parts, self.projection_norms), strict=True
            ):
                part.copy_(normed)
        return self._ops.rotate(qkv, self._layout, rotation, self.head_norms)

    def merge_heads(self, attended: torch.Tensor) -> torch.Tensor:
        """[rows, num_qo_heads, head_dim] -> [rows, hidden]."""
        return self.out(attended.flatten(1))


class MLP(ABC):
    """What a layer does to each row alone: one gated product, or several of which a router chooses."""

    @property
    @abstractmethod
    def linears(self) -> tuple[Linear | StackedLinear, ...]:
        """In the order they run."""

    @abstractmethod
    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The names of its tensors, and where they go."""

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, hidden]."""


class GatedMLP(MLP):
    """down(silu(gate(x)) * up(x)); a checkpoint calls the parts `gate_proj`, `up_proj` and `down_proj`."""

    def __init__(
        self,
        options: BlockOptions,
        *,
        bias: bool = False,
        fused_name: str | None = None,
        inner_size: int | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Without values.

        Args:
            options: what every block is made from
            bias: whether each product has one
            fused_name: what a checkpoint calls the one tensor that it has in the place of gate and up
            inner_size: outputs of the gate; default `intermediate_size`
            activation: [rows, 2 * inner_size], the gate's outputs first, to [rows, inner_size]; default `silu_and_mul`
        """
        self._activation, self._fused_name = activation or options.ops.silu_and_mul, fused_name
        hidden, inner = options.config.hidden_size, inner_size or options.config.intermediate_size
        share, parts = options.inner_share(inner), {"gate_proj": inner, "up_proj": inner}
        self.gate_up = options.linear("gate_up", hidden, parts, bias=bias, outputs=dict.fromkeys(parts, share))
        self.down = options.linear("down", inner, {"down_proj": hidden}, bias=bias, inputs=share)

    @property
    def linears(self) -> tuple[Linear, ...]:
        """See `MLP`."""
        return self.gate_up, self.down

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """See `MLP`."""
        yield from linear_parameters(self.gate_up, self._fused_name)
        yield from linear_parameters(self.down)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `MLP`; on the CPU some rows at a time, whose inner values stay in its caches."""
        if len(x) <= ROWS_AT_ONCE or x.device.type != "cpu":
            return self._rows(x)
        out = torch.empty_like(x)
        for start in range(0, len(x), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            self._rows(x[rows], out[rows])
        return out

    def _rows(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.down(self._activation(self.gate_up(x)), out)


@dataclass(frozen=True)
class NormNames:
    """Where a layer has norms, and what a checkpoint calls them; None where there is none."""

    before_attention: str | None = None
    after_attention: str | None = None
    """Of what attention adds to the residual stream."""
    before_mlp: str | None = None
    after_mlp: str | None = None

    @property
    def in_order(self) -> tuple[str | None, ...]:
        """All four."""
        return self.before_attention, self.after_attention, self.before_mlp, self.after_mlp


PRE_NORM = NormNames(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
"""Each block reads the normalised residual stream, and its output is added as it is."""


class DecoderLayer:
    """Attention and a feed-forward block, in two pieces: what comes before attention, and what comes after.

    CUDA graphs of mixed steps are captured piece by piece, and attention runs between them.
    """

    def __init__(
        self, options: BlockOptions, index: int, attention: AttentionBlock, mlp: MLP, norms: NormNames = PRE_NORM
    ) -> None:
        self.index, self.attention, self.mlp = index, attention, mlp
        self._ops, self._multiplier = options.ops, options.config.residual_multiplier
        self._names, hidden = norms, options.config.hidden_size
        self._norms = [None if name is None else options.norm(hidden) for name in norms.in_order]
        self._before_attention, self._after_attention, self._before_mlp, self._after_mlp = self._norms

    @property
    def linears(self) -> tuple[Linear | StackedLinear, ...]:
        """In the order they run."""
        return *self.attention.linears, *self.mlp.linears

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """The names of its tensors below the layer's own, and where they go."""
        for name, norm in zip(self._names.in_order, self._norms, strict=True):
            if norm is not None:
                yield f"{name}.weight", norm_parameter(norm)
        yield from below("self_attn", self.attention.named_parameters())
        yield from below("mlp", self.mlp.named_parameters())

    def before_attention(
        self, residual: torch.Tensor, delta: torch.Tensor | None, rotation: Rotation | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [rows, num_qo_heads, head_dim], k and v [rows, num_kv_heads, head_dim].

        Args:
            residual: [rows, hidden]; `delta` is added in place
            delta: [rows, hidden], what the layer before left to add; None for the first layer
            rotation: of these rows; None where the layer rotates nothing
        """
        return self.attention.project(self._input(residual, delta, self._before_attention), rotation)

    def after_attention(self, residual: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What is left to add, [rows, hidden], after attention's output [rows, num_qo_heads, head_dim]."""
        delta = self._output(self.attention.merge_heads(attended), self._after_attention)
        return self._output(self.mlp(self._input(residual, delta, self._before_mlp)), self._after_mlp)

    def __call__(
        self, residual: torch.Tensor, delta: torch.Tensor | None, rotation: Rotation | None, attention: Attention
    ) -> torch.Tensor:
        """What this layer adds to the residual stream at its end, [rows, hidden]; adding it is left to the next norm.

        Args:
            residual: [rows, hidden]; `delta` and the attention's output are added in place
            delta: [rows, hidden], what the layer before left to add; None for the first layer
            rotation: of these rows; None where the layer rotates nothing
            attention: over this step's rows
        """
        return self.after_attention(
            residual, self.attend(attention, *self.before_attention(residual, delta, rotation))
        )  # q, k and v are not held beyond attention

    def attend(self, attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What lies between the two pieces: [rows, num_qo_heads, head_dim] of what `before_attention` returned."""
        return attention(self.index, q, k, v, self.attention.sinks)

    def _input(self, residual: torch.Tensor, delta: torch.Tensor | None, norm: RMSNorm | None) -> torch.Tensor:
        """What a block reads: the residual stream with `delta` added in place, normalised where there is a norm."""
        if norm is None:
            return residual if delta is None else residual.add_(delta)
        return self._ops.rms_norm(residual, norm) if delta is None else self._ops.add_rms_norm(residual, delta, norm)

    def _output(self, output: torch.Tensor, norm: RMSNorm | None) -> torch.Tensor:
        """What a block adds to the residual stream."""
        if norm is not None:
            output = self._ops.rms_norm(output, norm)
        return output if self._multiplier == 1 else output.mul_(self._multiplier)


def linear_parameters(linear: Linear, fused_name: str | None = None) -> Iterator[tuple[str, Parameter]]:
    """`PART.weight` and `PART.bias` of each part, or of the one tensor `fused_name` that holds all parts in order."""
    parts = linear.spec.parts if fused_name is None else {fused_name: linear.spec.out_features}
    for part, rows in parts.items():
        is_whole = fused_name is not None
        load = partial(_load_parts, linear) if is_whole else partial(linear.load, part)
        yield f"{part}.weight", Parameter((rows, linear.spec.in_features), load)
        if linear.bias is not None:
            load = partial(_load_bias_parts, linear) if is_whole else partial(linear.load_bias, part)
            yield f"{part}.bias", Parameter((rows,), load)


def _load_parts(linear: Linear, stored: StoredTensor) -> None:
    for part in linear.spec.parts:
        linear.load(part, stored.rows(linear.spec.rows_of(part)))


def _load_bias_parts(linear: Linear, stored: StoredTensor) -> None:
    for part in linear.spec.parts:
        linear.load_bias(part, stored.rows(linear.spec.rows_of(part)))


def norm_parameter(norm: RMSNorm, share: Share | None = None) -> Parameter:
    """The weight of a norm; `share`: this rank's part of it, where ranks share the values."""
    share = share or Share.whole(len(norm.weight))
    return Parameter((share.total,), partial(_copy_part, norm.weight, share))


def below(prefix: str, parameters: Iterator[tuple[str, Parameter]]) -> Iterator[tuple[str, Parameter]]:
    """The same parameters, their names behind `prefix` and a dot."""
    for name, parameter in parameters:
        inner = tuple(f"{prefix}.{stood_for}" for stood_for in parameter.stands_for)
        yield f"{prefix}.{name}", replace(parameter, stands_for=inner) if inner else parameter


def _is_even(num_blocks: int, num_ranks: int) -> bool:
    """Whether no rank has more than an eighth more blocks than another."""
    return num_blocks % num_ranks == 0 or num_blocks >= 8 * num_ranks


def _copy_part(weight: torch.Tensor, share: Share, stored: StoredTensor) -> None:
    weight.copy_(stored.values()[share.slice])
