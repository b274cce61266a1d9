"""What ranks exchange tensors by."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

__all__ = ["Exchange"]


class Exchange(ABC):
    """One rank's way to the others. All ranks call the same methods in the same order, with tensors of one shape.

    Tensors are contiguous. Each method raises `RuntimeError` where another rank has left.
    """

    @abstractmethod
    def sum(self, x: torch.Tensor) -> None:
        """Put the sum of all ranks' x [...] in its place, in its dtype; the same bits on every rank."""

    @abstractmethod
    def least(self, x: torch.Tensor) -> None:
        """Put the smallest of all ranks' numbers at each place of x [...] in its place; waits for all."""

    @abstractmethod
    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """On rank 0 every rank's x [...]; on others none."""

    @abstractmethod
    def broadcast(self, x: torch.Tensor) -> None:
        """Write rank 0's x [...] over that of the others."""

    @abstractmethod
    def close(self) -> None:
        """Leave; the others may still be at work."""
