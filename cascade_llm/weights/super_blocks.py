"""Rounding to "q4_k": groups of 32 in super-blocks of 256, whose scales and minima are 6 bits of the super-block's.

A group's scale and minimum are searched: its largest weight is tried on several codes, and each try is followed by the
least squares of its rounding, as llama.cpp does. Super-blocks are rounded until they stay as they are, since the 6 bits
may leave a grid that the search would not choose. `super_blocks.c` does it; `rounded_by_torch` is its slow twin, which
serves where no native code does.
"""

from __future__ import annotations

import functools
from ctypes import c_int, c_long, c_void_p
from dataclasses import dataclass

import torch

from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import SUPER_BLOCKS
from cascade_llm.errors import BackendError
from cascade_llm.weights.codes import SUPER_LEN, CodeLayout, Codes

__all__ = ["SuperBlocks", "native_rounding", "rounded_by_torch", "rounded_natively", "super_block_codes"]

GROUP_LEN = 32
MAX_CODE, MAX_SUB = 15, 63
"""Codes have 4 bits, sub-scales 6."""
SEARCHED_ENDS = (14.0, 14.5, 15.0, 15.5, 16.0)
"""Codes on which the largest weight of a group is tried; the smallest is tried on 0. Sixteen of them take the error of
normal weights from 7.27 to 7.20 % of their size, and three times as long; one alone has 7.60 %."""
MAX_ROUNDS = 16


def super_block_codes(values: torch.Tensor) -> Codes:
    """Codes of finite float32 `values` [rows, inputs]; inputs are a multiple of 256."""
    blocks = values.reshape(-1, SUPER_LEN)
    function = native_rounding()
    rounded = rounded_by_torch(blocks) if function is None else rounded_natively(blocks, function)
    return rounded.codes_of(len(values))


@dataclass(frozen=True, eq=False)
class SuperBlocks:
    """Rounded super-blocks, a row each."""

    codes: torch.Tensor
    """[blocks, 256] uint8."""
    scales: torch.Tensor
    """[blocks, 1] float16 super-scales."""
    minima: torch.Tensor
    """As `scales`; not positive."""
    sub_scales: torch.Tensor
    """[blocks, 8] int8."""
    sub_minima: torch.Tensor
    """As `sub_scales`."""

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields in their order."""
        return self.codes, self.scales, self.minima, self.sub_scales, self.sub_minima

    def rows(self, index: torch.Tensor) -> SuperBlocks:
        """Those of some rows, by a mask or int64 indices."""
        return SuperBlocks(*(tensor[index] for tensor in self.tensors))

    def replace(self, index: torch.Tensor, others: SuperBlocks) -> None:
        """Overwrite the rows of int64 `index`."""
        for mine, other in zip(self.tensors, others.tensors, strict=True):
            mine[index] = other

    def codes_of(self, num_rows: int) -> Codes:
        """Of a matrix of so many rows."""
        layout = CodeLayout("u4", 0, GROUP_LEN, "sub", has_minimum=True)
        return Codes(layout, *(tensor.reshape(num_rows, -1) for tensor in self.tensors))

    def dequantized(self) -> torch.Tensor:
        """The weights [blocks, 256] in float32."""
        return self.codes_of(len(self.codes)).dequantized()


def rounded_natively(values: torch.Tensor, function: NativeFunction) -> SuperBlocks:
    """Of finite float32 `values` [super-blocks, 256], by `native_rounding`'s function."""
    count, groups = len(values), SUPER_LEN // GROUP_LEN
    values, ends = values.contiguous(), torch.tensor(SEARCHED_ENDS)
    rounded = SuperBlocks(
        torch.empty(count, SUPER_LEN, dtype=torch.uint8),
        *(torch.empty(count, 1, dtype=torch.float16) for _ in range(2)),
        *(torch.empty(count, groups, dtype=torch.int8) for _ in range(2)),
    )
    function(
        values.data_ptr(),
        count,
        ends.data_ptr(),
        len(ends),
        *(tensor.data_ptr() for tensor in rounded.tensors),
        torch.get_num_threads(),
    )
    return rounded


@functools.cache
def native_rounding() -> NativeFunction | None:
    """`round_super_blocks` of the C file; None where there is no native code."""
    try:
        function = native_functions(SUPER_BLOCKS)["round_super_blocks"]
    except BackendError:
        return None
    function.declare(c_void_p, c_long, c_void_p, c_long, *[c_void_p] * 5, c_int)
    return function


def rounded_by_torch(values: torch.Tensor) -> SuperBlocks:
    """Of finite float32 `values` [super-blocks, 256]."""
    found = _rounded_once(values)
    moving = torch.arange(len(found.codes))
    for _ in range(MAX_ROUNDS):
        before = found.rows(moving).dequantized()
        again = _rounded_once(before)
        has_moved = (again.dequantized() != before).any(1)
        moving = moving[has_moved]
        if not len(moving):
            break
        found.replace(moving, again.rows(has_moved))
    return found


def _rounded_once(values: torch.Tensor) -> SuperBlocks:
    """Of values [super-blocks, 256]."""
    groups = values.view(len(values), -1, GROUP_LEN)
    scales, minima = _searched(groups)
    super_scales, sub_scales = _by_sixty_three(scales)
    super_minima, sub_minima = _by_sixty_three(-minima)
    shifted = groups + (super_minima.float() * sub_minima).unsqueeze(-1)
    codes = _whole_steps(shifted, super_scales.float() * sub_scales).clamp_(0, MAX_CODE).flatten(1)
    subs = sub_scales.to(torch.int8), sub_minima.to(torch.int8)
    return SuperBlocks(codes.to(torch.uint8), super_scales, -super_minima, *subs)


def _searched(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum (at most 0) [rows, groups] of the least weighted squared error, over several roundings.

    A large weight counts more, as its input does in the products that matter.
    """
    importance = groups.square().mean(-1, keepdim=True).sqrt() + groups.abs()
    low, high = groups.amin(-1).clamp_max(0), groups.amax(-1)
    best_scale = torch.zeros_like(low)
    best_low, best_error = low.clone(), torch.full_like(low, torch.inf)
    for end in SEARCHED_ENDS:
        first = ((high - low) / end).clamp_min(0)
        codes = _whole_steps(groups - low.unsqueeze(-1), first).clamp_(0, MAX_CODE)
        for scale, minimum in ((first, low), _least_squares(groups, codes, importance)):
            error = codes * scale.unsqueeze(-1) + minimum.unsqueeze(-1) - groups
            total = (importance * error.square_()).sum(-1)
            better = total < best_error
            best_error = torch.where(better, total, best_error)
            best_scale, best_low = torch.where(better, scale, best_scale), torch.where(better, minimum, best_low)
    return best_scale, best_low


def _least_squares(
    groups: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and minimum that come closest to groups with these codes; neither has the wrong sign."""
    weight, linear, square, goal, mixed = (
        (importance * part).sum(-1) for part in (torch.ones_like(codes), codes, codes.square(), groups, codes * groups)
    )
    determinant = weight * square - linear.square()
    scale = (weight * mixed - linear * goal) / determinant
    minimum = (square * goal - linear * mixed) / determinant
    alone = torch.where(square > 0, mixed / square, 0.0)
    has_both = (determinant > 0) & (minimum <= 0)
    scale = torch.where(has_both, scale, alone).clamp_min(0)
    return scale, torch.where(has_both, minimum, 0.0)


def _by_sixty_three(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Non-negative numbers [super-blocks, 8] as a float16 [super-blocks, 1] times 0 to 63."""
    super_scales = (numbers.amax(-1, keepdim=True) / MAX_SUB).half()
    steps = torch.where(super_scales == 0, 0.0, numbers / super_scales.float()).round_()
    return super_scales, steps.clamp_(0, MAX_SUB)


def _whole_steps(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest whole numbers of steps; 0 where a step is 0."""
    steps = scales.unsqueeze(-1)
    return torch.where(steps == 0, 0.0, groups / steps).round_()
