"""Scratch memory that is kept between steps."""

from __future__ import annotations

import math

import torch

__all__ = ["Workspace"]


class Workspace:
    """Named scratch tensors, reused call after call.

    A tensor of megabytes that is allocated anew in each step comes as fresh pages from the operating system, whose
    faults cost more than the arithmetic on them.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def take(
        self, name: str, shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """A contiguous tensor with undefined content; whoever takes `name` next overwrites it."""
        num_elements = math.prod(shape)
        key = name, dtype, torch.device(device)
        flat = self._flat.get(key)
        if flat is None or flat.numel() < num_elements:
            flat = self._flat[key] = torch.empty(num_elements, dtype=dtype, device=device)
        return flat[:num_elements].view(shape)
