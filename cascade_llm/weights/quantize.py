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
from cascade_llm.weights.super_blocks import super_block_codes

__all__ = ["QUANTIZERS", "quantized", "quantized_rows"]

GROUP_LEN = 32
BLOCK_LEN = 128
"""Rows, and inputs, of an FP8 block."""
CHUNK_LEN = 1 << 18
"""Values that are quantized at a time, so that their temporaries stay in the last-level cache."""

LARGEST_FP8 = 448.0


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


def _steps(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest whole numbers of steps; 0 where a step is 0."""
    steps = scales.unsqueeze(-1)
    return torch.where(steps == 0, 0.0, groups / steps).round_()


QUANTIZERS: Mapping[str, Quantizer] = {
    "q8_0": Quantizer(_q8_0, GROUP_LEN),
    "q4_k": Quantizer(super_block_codes, SUPER_LEN),
    "int8": Quantizer(_int8),
    "int4": Quantizer(int4_codes, GROUP_LEN),
    "fp8": Quantizer(_fp8, rows_together=BLOCK_LEN),
}
"""By the name that a user gives."""
