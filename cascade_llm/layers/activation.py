"""The gate of a SwiGLU feed-forward (Shazeer 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["silu_and_mul"]


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, for gate_up [rows, 2 * size] with the gate first; -> [rows, size], contiguous."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
