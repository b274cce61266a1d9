"""How far an attention backend's answer is from the float64 reference, and how far it may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["TOLERANCES", "AttentionError", "largest_difference"]

TOLERANCES = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest absolute error of output and LSE, for queries, keys and values drawn from the normal distribution."""


@dataclass(slots=True)
class AttentionError:
    """The largest absolute errors seen; NaN counts as infinite."""

    out: float = 0.0
    lse: float = 0.0
    num_plans: int = 0
    num_rows: int = 0

    def add(self, found: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Take in one plan's out [rows, num_qo_heads, head_dim] and lse [rows, num_qo_heads]."""
        self.out = max(self.out, largest_difference(found[0], expected[0]))
        self.lse = max(self.lse, largest_difference(found[1], expected[1]))
        self.num_plans += 1
        self.num_rows += len(found[0])

    def within(self, tolerance: float) -> bool:
        """Whether both errors keep to it."""
        return self.out <= tolerance and self.lse <= tolerance

    def __str__(self) -> str:
        return f"output {self.out:.1e}, LSE {self.lse:.1e}"


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference of two tensors [...] of one shape, in float64; infinite where either holds NaN."""
    difference = (a.double() - b.double()).abs().max().item()
    return float("inf") if difference != difference else float(difference)
