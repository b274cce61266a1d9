"""Attention sinks (gpt-oss): a learned score per query head that takes a share of the softmax and gives nothing.

A sink is a key of score s whose value is zero. Beside keys with log-sum-exp L the weights of these shrink by
e^L / (e^L + e^s) = sigmoid(L - s), whatever the keys are and wherever they lie. So a sink enters a row once, when its
levels are merged, and no kernel knows of it.
"""

from __future__ import annotations

import math

import torch

__all__ = ["apply_sinks"]

LN_2 = math.log(2.0)


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Take the sinks' share from merged attention, in place; a row without keys stays zero.

    Args:
        out: [rows, num_qo_heads, head_dim]
        lse: [rows, num_qo_heads], float32, base 2
        sinks: [num_qo_heads], float32, base e

    Returns:
        `out`
    """
    share = torch.sigmoid(torch.mul(lse, LN_2).sub_(sinks))
    return out.mul_(share.unsqueeze(-1))
