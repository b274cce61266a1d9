"""int4 as it is made while loading: four bits a weight, and a scale and a minimum for every 32 of them."""

from __future__ import annotations

import torch

from cascade_llm.weights.codes import CodeLayout, Codes

__all__ = ["int4_codes"]

GROUP_LEN = 32
MAX_CODE, MIDDLE_CODE = 15, 8
LAYOUT = CodeLayout("u4", zero=MIDDLE_CODE, group_len=GROUP_LEN, has_minimum=True)


def int4_codes(weight: torch.Tensor) -> Codes:
    """Of values [rows, inputs] of any float dtype; of two grids each group takes the one that comes closer."""
    groups = weight.float().view(len(weight), -1, GROUP_LEN)
    spanning, symmetric = (_codes(groups, *grid) for grid in (_spanning_grid(groups), _symmetric_grid(groups)))
    errors = [(values - groups).square_().sum(-1, keepdim=True) for *_, values in (spanning, symmetric)]
    closer = errors[1] < errors[0]
    codes, scale, zero = (torch.where(closer, b, a) for a, b in zip(spanning[:3], symmetric[:3], strict=True))
    return Codes(LAYOUT, codes.flatten(1).to(torch.uint8), scale.squeeze(-1), zero.squeeze(-1))


def _spanning_grid(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero that put the smallest weight of a group on code 0 and the largest on 15: Q4_1's grid."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scale = _rounded((high - low) / MAX_CODE)
    return scale, _rounded(low + MIDDLE_CODE * scale)


def _symmetric_grid(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale that puts the weight of largest magnitude on code 0, and zero 0: Q4_0's grid."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = _rounded(extreme / -MIDDLE_CODE)
    return scale, torch.zeros_like(scale)


def _codes(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of the nearest points of a grid, the grid, and the values of those points."""
    steps = torch.where(scale == 0, 0.0, (groups - zero) / scale).round_()
    codes = (steps + MIDDLE_CODE).clamp_(0, MAX_CODE)
    return codes, scale, zero, (codes - MIDDLE_CODE) * scale + zero


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """As the kernel holds it."""
    return x.half().float()
