"""Which experts a row goes to, and what becomes of their outputs; in torch for any device, as the others' twin.

A step's rows are ordered by expert, so that one grouped product serves all experts. Nothing here reads the device's
memory on the host, and all shapes follow from the number of rows: captured graphs may hold it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

__all__ = ["RoutedRows", "Router", "Routing", "TorchRouter"]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """How experts are chosen by their logits: the largest, with their share of the softmax over all experts as weights.

    The softmax over the chosen logits alone is the same as the share of all, divided by the sum of the chosen.
    """

    num_experts: int
    num_chosen: int
    """Of a row."""
    divides_by_sum: bool
    """Whether a row's weights sum to 1."""


@dataclass(frozen=True, eq=False)
class RoutedRows:
    """The rows of a step, a copy for each expert that it goes to, ordered by expert."""

    sources: torch.Tensor
    """int64 [rows * num_chosen], the row that a copy is of."""
    ends: torch.Tensor
    """int32 [num_experts], where each expert's copies end; they lie one behind the other."""
    places: torch.Tensor
    """int64 [rows, num_chosen], where a row's copies are, that of the largest weight first."""
    weights: torch.Tensor
    """float32 [rows, num_chosen], of their outputs."""


class Router(ABC):
    """The two ends of a block of experts."""

    name: str

    @abstractmethod
    def route(self, logits: torch.Tensor, routing: Routing) -> RoutedRows:
        """Choose experts by logits [rows, num_experts]. Of equal logits the lower expert comes first."""

    @abstractmethod
    def combine(self, outputs: torch.Tensor, routed: RoutedRows) -> torch.Tensor:
        """[rows, size], the weighted sums of each row's outputs, of [rows * num_chosen, size]; summed in float32."""


class TorchRouter(Router):
    """A dozen torch operations, most of them a sort's."""

    name = "torch"

    def route(self, logits: torch.Tensor, routing: Routing) -> RoutedRows:
        """See `Router`."""
        probabilities = logits.float().softmax(-1)
        order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, : routing.num_chosen]
        weights = probabilities.gather(1, order)
        if routing.divides_by_sum:
            weights = weights / weights.sum(-1, keepdim=True)
        experts, copies = torch.sort(order.flatten(), stable=True)
        numbers = torch.arange(routing.num_experts, device=logits.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        places = torch.empty_like(copies)
        places[copies] = torch.arange(len(copies), device=logits.device)
        return RoutedRows(copies // routing.num_chosen, ends, places.view(order.shape), weights)

    def combine(self, outputs: torch.Tensor, routed: RoutedRows) -> torch.Tensor:
        """See `Router`."""
        chosen = outputs[routed.places].float()
        return (chosen * routed.weights.unsqueeze(-1)).sum(1).to(outputs.dtype)
