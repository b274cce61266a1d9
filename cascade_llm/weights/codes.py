"""The common currency of quantized formats: small integers, and the numbers that turn groups of them into weights.

    W[o, i] = scale[o, g] * (value(code[o, i]) - zero) + minimum[o, g]        g = i // group_len

Every quantized checkpoint is read as `Codes`, whatever its file calls them, and every kernel multiplies them. What is
the same for all rows is the `CodeLayout`; a kernel is chosen by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch

from cascade_llm.errors import CheckpointError

__all__ = ["FLOAT_CODES", "INTEGER_BITS", "ROWS_TOGETHER", "SUPER_LEN", "CodeLayout", "Codes", "groups_of_part"]

INTEGER_BITS = {"u2": 2, "u3": 3, "u4": 4, "u5": 5, "u6": 6, "u8": 8}
"""Unsigned integers by their width."""
FLOAT_CODES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float32": torch.float32,
}
"""Codes that are numbers themselves: their zero is 0 and they have no minimum."""
ROWS_TOGETHER = 128
"""A multiple of the rows that share scales, in any format, and of those of a tile: chunks of rows begin at one."""
NOT_SIGN = 0x7F
"""Of a byte; with all its bits set a float8_e4m3fn is NaN."""
SUPER_LEN = 256
"""Inputs that share a super-scale where scales are themselves integers: GGUF's K types."""
LEAST_GROUP_LEN = 16
"""Of inputs that share a scale: with shorter groups a matrix is smaller as plain values."""


@dataclass(frozen=True)
class CodeLayout:
    """What the codes of a matrix mean."""

    code: str
    """A key of `INTEGER_BITS` or of `FLOAT_CODES`."""
    zero: int = 0
    """Subtracted from every code."""
    group_len: int | None = 32
    """Inputs that share a scale: 16, or a multiple of 32, or all inputs; None where there are no scales."""
    scale: str = "float16"
    """How scales and minima are stored: "float16" or "float32", both exact as they come, or "sub": an integer of 8 bits
    times the float16 super-scale of its `SUPER_LEN` inputs."""
    has_minimum: bool = False
    values: tuple[float, ...] | None = None
    """What a code of 4 bits stands for, 16 numbers; None where a code is its own value. Products are fast where all are
    integers of -128 to 127."""

    @property
    def bits(self) -> int:
        """Of a code."""
        return INTEGER_BITS[self.code] if self.code in INTEGER_BITS else 8 * FLOAT_CODES[self.code].itemsize


@dataclass(frozen=True, eq=False)
class Codes:
    """Rows of a matrix [rows, inputs], on the CPU."""

    layout: CodeLayout
    codes: torch.Tensor
    """[rows, inputs], uint8, or the dtype of a float code."""
    scales: torch.Tensor | None = None
    """[rows, groups] float32; of "sub": float16 super-scales [rows, inputs / SUPER_LEN]."""
    minima: torch.Tensor | None = None
    """As `scales`; added. Of "sub": float16 super-minima."""
    sub_scales: torch.Tensor | None = None
    """Of "sub": int8 [rows, groups]."""
    sub_minima: torch.Tensor | None = None
    """Of "sub" with minima: int8 [rows, groups]."""
    input_order: torch.Tensor | None = None
    """int64 [inputs]: column j of `codes` is input `input_order[j]` of the matrix; None where they are in order."""

    def dequantized(self) -> torch.Tensor:
        """The weights [rows, inputs] in float32, by the formula: what every kernel is compared with."""
        layout = self.layout
        values = self.codes.float()
        if layout.values is not None:
            values = torch.tensor(layout.values, dtype=torch.float32)[self.codes.long()]
        if layout.group_len is not None:
            groups = (values - layout.zero).view(len(values), -1, layout.group_len)
            groups = groups * self.group_scales().unsqueeze(-1)
            if layout.has_minimum:
                groups = groups + self.group_minima().unsqueeze(-1)
            values = groups.flatten(1)
        if self.input_order is None:
            return values
        return torch.empty_like(values).index_copy_(1, self.input_order, values)

    def columns(self, part: slice) -> Codes | None:
        """The codes of some inputs, which have the same values; None where their groups would be too short.

        A cut within a group makes groups of the cut's length. One within a super-block multiplies its scales out, which
        float32 holds exactly. Inputs that are out of order belong to groups of all parts, so they are not cut.

        Args:
            part: of the inputs, with start and stop
        """
        if self.input_order is not None:
            return None
        layout, codes = self.layout, self.codes[:, part]
        if layout.group_len is None:
            return Codes(layout, codes)
        cut_len = gcd(part.start, part.stop, SUPER_LEN)
        if layout.scale == "sub" and cut_len == SUPER_LEN:
            supers = slice(part.start // SUPER_LEN, part.stop // SUPER_LEN)
            groups = slice(part.start // layout.group_len, part.stop // layout.group_len)
            subs = (None if n is None else n[:, groups] for n in (self.sub_scales, self.sub_minima))
            return Codes(
                layout, codes, *(None if n is None else n[:, supers] for n in (self.scales, self.minima)), *subs
            )
        cut = groups_of_part(layout.group_len, part)
        if cut is None:
            return None
        unit, kept = cut
        minima = self.group_minima()[:, kept] if layout.has_minimum else None
        scale = "float32" if layout.scale == "sub" else layout.scale
        return Codes(replace(layout, group_len=unit, scale=scale), codes, self.group_scales()[:, kept], minima)

    def check(self) -> None:
        """Raise `CheckpointError` where a code of float8_e4m3fn is NaN: kernels may take it for a number."""
        if self.codes.dtype != torch.float8_e4m3fn:
            return
        if bool(self.codes.view(torch.uint8).bitwise_and(NOT_SIGN).eq(NOT_SIGN).any()):
            raise CheckpointError("a matrix of float8_e4m3fn codes holds NaN: copy or download the checkpoint again")

    def group_scales(self) -> torch.Tensor:
        """[rows, groups] float32, of codes that have scales."""
        return self._expanded(self.scales, self.sub_scales)

    def group_minima(self) -> torch.Tensor:
        """[rows, groups] float32, of codes that have minima."""
        return self._expanded(self.minima, self.sub_minima)

    def _expanded(self, numbers: torch.Tensor | None, subs: torch.Tensor | None) -> torch.Tensor:
        """[rows, groups] float32."""
        assert numbers is not None
        if subs is None:
            return numbers
        per_super = subs.shape[1] // numbers.shape[1]
        return numbers.float().repeat_interleave(per_super, dim=1) * subs.float()


def groups_of_part(group_len: int, part: slice) -> tuple[int, torch.Tensor] | None:
    """The longest equal groups of some inputs that cross no end of a group, and the group that each lies in.

    Args:
        group_len: inputs that share a scale, of the whole matrix
        part: of the inputs, with start and stop

    Returns:
        their length and int64 [groups of the part]; None where they would be too short
    """
    unit = gcd(part.start, part.stop, group_len)
    if unit < LEAST_GROUP_LEN:
        return None
    return unit, torch.arange(part.start, part.stop, unit) // group_len
