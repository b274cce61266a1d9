"""A mixture of experts: a router sends each row through a few of many gated products (Shazeer et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch

from cascade_llm.layers.routing import Routing
from cascade_llm.models.blocks import MLP, BlockOptions, GatedMLP, Parameter, below, linear_parameters
from cascade_llm.weights.format import StoredTensor
from cascade_llm.weights.linear import Linear
from cascade_llm.weights.stacked_linear import StackedLinear

__all__ = ["Experts", "StackOrder"]

StackOrder = Literal["outputs_first", "inputs_first"]
"""How one tensor holds the matrices of all experts: [experts, outputs, inputs], all outputs of the gate before those of
up; or [experts, inputs, outputs], where outputs of gate and up alternate (gpt-oss)."""


class Experts(MLP):
    """down(silu(gate(x)) * up(x)) of the chosen experts, summed by the router's weights, and perhaps of a shared one.

    A checkpoint calls the matrices of an expert `experts.N.gate_proj`, or has those of all experts in one tensor,
    `experts.gate_up_proj` and `experts.down_proj`, with biases `experts.gate_up_proj_bias`. It calls the router `gate`.
    The shared expert, `shared_expert`, has every row; its output is multiplied by the sigmoid of `shared_expert_gate`.
    """

    def __init__(
        self,
        options: BlockOptions,
        routing: Routing,
        inner_size: int,
        *,
        router_name: str = "gate",
        router_bias: bool = False,
        bias: bool = False,
        shared_size: int | None = None,
        activation: Callable[[torch.Tensor], torch.Tensor] | None = None,
        order: StackOrder = "outputs_first",
    ) -> None:
        """Without values.

        Args:
            options: what every block is made from
            routing: how many experts there are, and how they are chosen
            inner_size: outputs of an expert's gate
            router_name: in the checkpoint
            router_bias: whether the router has one
            bias: whether each product of an expert has one
            shared_size: outputs of the shared expert's gate; None where there is none
            activation: [n, 2 * inner_size], the gate's outputs first, to [n, inner_size]; default `silu_and_mul`
            order: of the tensors that hold all experts
        """
        self.routing, self._order = routing, order
        self._activation = activation or options.ops.silu_and_mul
        self._route, self._combine = options.router.route, options.router.combine
        hidden, count = options.config.hidden_size, routing.num_experts
        self.router = options.exact_linear("router", hidden, {router_name: count}, bias=router_bias)
        parts = {"gate_proj": inner_size, "up_proj": inner_size}
        share, self._ranks = options.inner_share(inner_size), options.ranks
        shares = dict.fromkeys(parts, share)
        self.gate_up = options.stacked("expert_gate_up", hidden, parts, count, bias=bias, outputs=shares)
        down = {"down_proj": hidden}
        self.down = options.stacked("expert_down", inner_size, down, count, bias=bias, inputs=share)
        self.shared: GatedMLP | None = None
        self.shared_gate: Linear | None = None
        if shared_size is not None:
            self.shared = GatedMLP(options, inner_size=shared_size)
            self.shared_gate = options.exact_linear("shared_gate", hidden, {"shared_expert_gate": 1}, bias=False)

    @property
    def linears(self) -> tuple[Linear | StackedLinear, ...]:
        """See `MLP`."""
        shared = () if self.shared is None else self.shared.linears
        gate = () if self.shared_gate is None else (self.shared_gate,)
        return self.router, self.gate_up, self.down, *shared, *gate

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """See `MLP`."""
        yield from linear_parameters(self.router)
        for index in range(self.routing.num_experts):
            for stack in (self.gate_up, self.down):
                yield from below(f"experts.{index}", matrix_parameters(stack, index))
        for name, stack in (("gate_up_proj", self.gate_up), ("down_proj", self.down)):
            yield f"experts.{name}", stack_parameter(stack, self._order)
            if stack.bias is not None:
                yield f"experts.{name}_bias", stack_bias_parameter(stack, self._order)
        if self.shared is not None and self.shared_gate is not None:
            yield from below("shared_expert", self.shared.named_parameters())
            yield from linear_parameters(self.shared_gate)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `MLP`."""
        routed = self._route(self.router(x), self.routing)
        inner = self._activation(self.gate_up(x, routed.ends, routed.sources))
        out = self._ranks.all_reduce(self._combine(self.down(inner, routed.ends), routed))
        if self.shared is None or self.shared_gate is None:
            return out
        return out.addcmul_(self.shared_gate(x).sigmoid_(), self.shared(x))


def matrix_parameters(stack: StackedLinear, index: int) -> Iterator[tuple[str, Parameter]]:
    """As `linear_parameters`, of one matrix of a stack."""
    for part, rows in stack.spec.parts.items():
        yield f"{part}.weight", Parameter((rows, stack.spec.in_features), partial(stack.load, index, part))
        if stack.bias is not None:
            yield f"{part}.bias", Parameter((rows,), partial(stack.load_bias, index, part))


def stack_parameter(stack: StackedLinear, order: StackOrder) -> Parameter:
    """All matrices of a stack in one tensor."""
    outputs, inputs = stack.spec.out_features, stack.spec.in_features
    sides = (outputs, inputs) if order == "outputs_first" else (inputs, outputs)
    return Parameter((stack.num_matrices, *sides), partial(_load_matrices, stack, order), _names(stack, "weight"))


def stack_bias_parameter(stack: StackedLinear, order: StackOrder) -> Parameter:
    """All biases of a stack in one tensor [matrices, outputs]."""
    shape = stack.num_matrices, stack.spec.out_features
    return Parameter(shape, partial(_load_biases, stack, order), _names(stack, "bias"))


def _names(stack: StackedLinear, kind: str) -> tuple[str, ...]:
    return tuple(f"experts.{index}.{part}.{kind}" for index in range(stack.num_matrices) for part in stack.spec.parts)


def _load_matrices(stack: StackedLinear, order: StackOrder, stored: StoredTensor) -> None:
    for index in range(stack.num_matrices):
        matrix = stored.matrix(index)
        if order == "inputs_first":
            matrix = StoredTensor.plain(matrix.values().t(), matrix.release)
        for part, rows in _rows_of_parts(stack, order):
            stack.load(index, part, matrix.rows(rows))


def _load_biases(stack: StackedLinear, order: StackOrder, stored: StoredTensor) -> None:
    values = stored.values()
    for index in range(stack.num_matrices):
        for part, rows in _rows_of_parts(stack, order):
            stack.load_bias(index, part, StoredTensor.plain(values[index, rows]))


def _rows_of_parts(stack: StackedLinear, order: StackOrder) -> list[tuple[str, slice]]:
    """Which outputs of a stored matrix are those of each part."""
    parts = stack.spec.parts
    if order == "outputs_first":
        return [(part, stack.spec.rows_of(part)) for part in parts]
    return [(part, slice(first, None, len(parts))) for first, part in enumerate(parts)]
