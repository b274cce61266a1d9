"""In situ quantizers: float rows of a matrix to `Codes` of few bits, while a checkpoint is loaded.

Each chooses scales that it finds again: values that came out of a quantizer pass through it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd

import torch

from cascade_llm.errors import CheckpointError, ConfigError
from cascade_llm.weights.codes import SUPER_LEN, CodeLayout, Codes
from cascade_llm.weights.format import StoredTensor
from cascade_llm.weights.int4 import int4_codes

__all__ = ["QUANTIZERS", "quantized", "quantized_rows"]

GROUP_LEN = 32
BLOCK_LEN = 128
"""Rows, and inputs, of an FP8 block."""
CHUNK_LEN = 1 << 21
"""Values that are quantized at a time: the temporaries of "q4_k" are a dozen times as large, in float32."""

LARGEST_FP8 = 448.0
MAX_CODE, MAX_SUB = 15, 63
"""Of "q4_k": codes of 4 bits, sub-scales of 6."""
SEARCHED_ENDS = (14.0, 14.5, 15.0, 15.5, 16.0)
"""Codes on which the largest weight of a group is tried; the smallest is tried on 0. Sixteen of them take the error of
normal weights from 7.27 to 7.20 % of their size, and three times as long; one alone has 7.60 %."""
MAX_ROUNDS = 16


@dataclass(frozen=True)
class Quantizer:
    """A way to round."""

    round: Callable[[torch.Tensor], Codes]
    """Of finite float32 rows [rows, inputs]."""
    multiple: int = 1
    """Inputs come in multiples of it."""
    rows_together: int = 1
    """Rows that share scales."""


FALLBACK = {"q4_k": "int4"}
"""For inputs that are no multiple of a method's: about as many bits, in smaller groups."""


def quantized(method: str, stored: StoredTensor) -> StoredTensor:
    """A plain tensor [rows, inputs] as one that is stored in codes of that method.

    One that is quantized already stays as it is, and one whose inputs no method takes.
    """
    if stored.codes is not None:
        return stored
    if stored.shape[1] % QUANTIZERS[method].multiple:
        return quantized(FALLBACK[method], stored) if method in FALLBACK else stored
    codes = partial(quantized_rows, method)
    return StoredTensor(
        method, stored.shape, stored.data, lambda rows: codes(rows).dequantized(), codes, stored.release
    )


def quantized_rows(method: str, values: torch.Tensor) -> Codes:
    """Round a matrix, or any rows of it that begin at a multiple of 128.

    Args:
        method: a key of `QUANTIZERS`
        values: [rows, inputs], any float dtype, on the CPU

    Raises:
        ConfigError: the format cannot hold this many inputs
        CheckpointError: a value is not finite, or too large for the scales
    """
    quantizer = QUANTIZERS[method]
    rows, inputs = values.shape
    if inputs % quantizer.multiple:
        raise ConfigError(
            f"quantization={method!r} takes multiples of {quantizer.multiple} inputs, a matrix has {inputs}: choose "
            "'int8' or 'fp8', which take any number"
        )
    step = max(1, CHUNK_LEN // inputs // quantizer.rows_together) * quantizer.rows_together
    return _joined([_checked(quantizer, values[first : first + step].float()) for first in range(0, rows, step)])


def _checked(quantizer: Quantizer, values: torch.Tensor) -> Codes:
    if not values.isfinite().all():
        raise CheckpointError("a matrix has values that are NaN or infinite, which no quantization can hold")
    codes = quantizer.round(values)
    for numbers in (codes.scales, codes.minima):
        if numbers is not None and not numbers.isfinite().all():
            raise CheckpointError(
                f"a matrix has values up to {float(values.abs().max()):g}, too large for a scale of "
                f"{codes.layout.scale}: quantize it to 'fp8' or 'int4'"
            )
    return codes


def _joined(parts: list[Codes]) -> Codes:
    def join(field: str) -> torch.Tensor | None:
        tensors = [getattr(part, field) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    fields = {field: join(field) for field in ("scales", "minima", "sub_scales", "sub_minima")}
    return Codes(parts[0].layout, torch.cat([part.codes for part in parts]), **fields)


def _q8_0(values: torch.Tensor) -> Codes:
    """Groups of 32, the largest magnitude on 127."""
    return _centred(values, GROUP_LEN)


def _int8(values: torch.Tensor) -> Codes:
    """As "q8_0", in a group for each row."""
    return _centred(values, values.shape[1])


def _centred(values: torch.Tensor, group_len: int) -> Codes:
    groups = values.view(len(values), -1, group_len)
    scales = (groups.abs().amax(-1) / 127).half().float()
    codes = _steps(groups, scales).clamp_(-127, 127) + 128
    return Codes(CodeLayout("u8", 128, group_len), codes.flatten(1).to(torch.uint8), scales)


def _fp8(values: torch.Tensor) -> Codes:
    """Blocks of 128 by 128, the largest magnitude on 448; scales are bfloat16 numbers, so that products are exact."""
    rows, inputs = values.shape
    columns = torch.stack([block.abs().amax(0) for block in torch.split(values, BLOCK_LEN)])
    peaks = torch.stack([block.amax(1) for block in torch.split(columns, BLOCK_LEN, dim=1)], dim=1)
    scales = (peaks / LARGEST_FP8).bfloat16().float()
    unit = gcd(inputs, BLOCK_LEN)
    spread = scales[torch.arange(rows) // BLOCK_LEN][:, torch.arange(0, inputs, unit) // BLOCK_LEN]
    groups = values.view(rows, -1, unit)
    steps = torch.where(spread.unsqueeze(-1) == 0, 0.0, groups / spread.unsqueeze(-1))
    codes = steps.clamp_(-LARGEST_FP8, LARGEST_FP8).flatten(1).to(torch.float8_e4m3fn)
    return Codes(CodeLayout("float8_e4m3fn", 0, unit, "float32"), codes, spread)


def _q4_k(values: torch.Tensor) -> Codes:
    """Groups of 32 in super-blocks of 256; the groups' scales and minima are 6 bits of the super-block's.

    Super-blocks are rounded until they stay as they are: the 6 bits may leave a grid that the search would not choose.
    """
    found = _super_blocks(values.view(-1, SUPER_LEN))
    moving = torch.arange(len(found.codes))
    for _ in range(MAX_ROUNDS):
        before = found.rows(moving).dequantized()
        again = _super_blocks(before)
        has_moved = (again.dequantized() != before).any(1)
        moving = moving[has_moved]
        if not len(moving):
            break
        found.replace(moving, again.rows(has_moved))
    return found.codes_of(len(values))


@dataclass(frozen=True, eq=False)
class _SuperBlocks:
    """Some super-blocks of "q4_k", a row each."""

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor
    sub_scales: torch.Tensor
    sub_minima: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.codes, self.scales, self.minima, self.sub_scales, self.sub_minima

    def rows(self, index: torch.Tensor) -> _SuperBlocks:
        return _SuperBlocks(*(tensor[index] for tensor in self.tensors))

    def replace(self, index: torch.Tensor, others: _SuperBlocks) -> None:
        for mine, other in zip(self.tensors, others.tensors, strict=True):
            mine[index] = other

    def codes_of(self, num_rows: int) -> Codes:
        layout = CodeLayout("u4", 0, GROUP_LEN, "sub", has_minimum=True)
        return Codes(layout, *(tensor.reshape(num_rows, -1) for tensor in self.tensors))

    def dequantized(self) -> torch.Tensor:
        return self.codes_of(len(self.codes)).dequantized()


def _super_blocks(values: torch.Tensor) -> _SuperBlocks:
    """Of values [super-blocks, 256]."""
    groups = values.view(len(values), -1, GROUP_LEN)
    scales, minima = _searched(groups)
    super_scales, sub_scales = _by_sixty_three(scales)
    super_minima, sub_minima = _by_sixty_three(-minima)
    shifted = groups + (super_minima.float() * sub_minima).unsqueeze(-1)
    codes = _steps(shifted, super_scales.float() * sub_scales).clamp_(0, MAX_CODE).flatten(1)
    subs = sub_scales.to(torch.int8), sub_minima.to(torch.int8)
    return _SuperBlocks(codes.to(torch.uint8), super_scales, -super_minima, *subs)


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
        codes = _steps(groups - low.unsqueeze(-1), first).clamp_(0, MAX_CODE)
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


def _steps(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest whole numbers of steps; 0 where a step is 0."""
    steps = scales.unsqueeze(-1)
    return torch.where(steps == 0, 0.0, groups / steps).round_()


QUANTIZERS: Mapping[str, Quantizer] = {
    "q8_0": Quantizer(_q8_0, GROUP_LEN),
    "q4_k": Quantizer(_q4_k, SUPER_LEN),
    "int8": Quantizer(_int8),
    "int4": Quantizer(int4_codes, GROUP_LEN),
    "fp8": Quantizer(_fp8, rows_together=BLOCK_LEN),
}
"""By the name that a user gives."""
