"""Codes of up to four bits on CUDA, multiplied by torch's own kernel for tensor cores (`_weight_int4pack_mm`).

The kernel holds  w = scale * (code - 8) + offset  for groups of 32 to 256 inputs, which is every grid of four bits that
a checkpoint comes in: symmetric or not, Q4_K and act-order too. Scales and offsets are rounded to bfloat16, as the
weights of a dense copy would be; inputs are not rounded, and sums are float32.

Each 16 rows of a product widen the whole matrix again. For hundreds of rows a dense copy would be faster, and there is
none: it would take four times the memory that this saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd

import torch

from cascade_llm.weights.codes import INTEGER_BITS, CodeLayout, Codes
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat
from cascade_llm.weights.gpu_parts import code_chunks, first_codes, reason_against_gpu

__all__ = ["CudaInt4"]

LEAST_ARCH = (8, 0)
GROUP_LENS = (256, 128, 64, 32)
MIDDLE_CODE, MAX_BITS = 8, 4
TILE_OUTPUTS, TILE_INPUTS = 8, 16
MAX_OUTPUTS = TILE_OUTPUTS * 65535
"""Tiles of outputs are the second dimension of the kernel's grid."""


class CudaInt4(WeightFormat):
    """Codes in the kernel's order, and a scale and an offset for each group."""

    name = "cuda_int4"

    def __init__(self, spec: MatrixSpec, parts: Mapping[str, StoredTensor]) -> None:
        """Pack the codes of all parts on the device, some rows at a time."""
        first = first_codes(parts)
        self.spec = spec
        self.codes_of_parts = tuple(dict.fromkeys(codes.layout.code for codes in first))
        group_len = _group_len([codes.layout for codes in first])
        assert group_len is not None, "reasons_against was not asked"
        self._group_len = group_len
        inputs, device = spec.in_features, spec.options.device
        self._tiles_together = gcd(inputs // TILE_INPUTS, 8)
        word_shape = (32, self._tiles_together // 2)
        self._words = torch.empty(
            (spec.out_features // TILE_OUTPUTS, inputs // (TILE_INPUTS * self._tiles_together), *word_shape),
            dtype=torch.int32,
            device=device,
        )
        self._grid = torch.empty((inputs // self._group_len, spec.out_features, 2), dtype=torch.bfloat16, device=device)
        for rows, codes in code_chunks(spec, parts):
            self._take(rows, codes)
        order = first[0].input_order
        self._input_order = None if order is None else order.to(device)

    @staticmethod
    def reasons_against(spec: MatrixSpec, parts: Mapping[str, StoredTensor]) -> list[str]:
        """The device, the dtype, the shape, wider codes, or parts that differ in what all of a matrix shares."""
        if reason := reason_against_gpu(spec.options, parts, LEAST_ARCH):
            return [reason]
        if any(rows % TILE_OUTPUTS for rows in spec.parts.values()) or spec.out_features > MAX_OUTPUTS:
            return [f"its kernel takes parts of a multiple of {TILE_OUTPUTS} outputs, at most {MAX_OUTPUTS:,} together"]
        first = first_codes(parts)
        for layout in (codes.layout for codes in first):
            if INTEGER_BITS.get(layout.code, MAX_BITS + 1) > MAX_BITS or layout.values is not None:
                return [f"its kernel takes whole numbers of {MAX_BITS} bits, not {_told(layout)}"]
        if _group_len([codes.layout for codes in first]) is None:
            lengths = ", ".join(str(codes.layout.group_len) for codes in first)
            return [f"its kernel takes groups of {', '.join(map(str, GROUP_LENS))} inputs, not {lengths}"]
        if not all(_same(codes.input_order, first[0].input_order) for codes in first):
            return ["its parts take the inputs in different orders"]
        return []

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `WeightFormat`; the kernel makes its own memory, so `out` costs a copy."""
        x = x.contiguous() if self._input_order is None else x.index_select(1, self._input_order)
        if len(x):
            y: torch.Tensor = torch.ops.aten._weight_int4pack_mm(x, self._words, self._group_len, self._grid)
        else:
            y = x.new_empty(0, self.spec.out_features)
        if bias is not None:
            y += bias
        return y if out is None else out.copy_(y)

    @property
    def num_bytes(self) -> int:
        """See `WeightFormat`."""
        return self._words.nbytes + self._grid.nbytes

    def describe(self) -> str:
        """The codes, and what is rounded."""
        return f"{'+'.join(self.codes_of_parts)} on tensor cores (scales rounded to bfloat16)"

    def _take(self, rows: slice, codes: Codes) -> None:
        values, layout = codes.codes, codes.layout
        pairs = (values[:, ::2] << 4 | values[:, 1::2]).to(self._words.device)
        tiles = slice(rows.start // TILE_OUTPUTS, rows.stop // TILE_OUTPUTS)
        self._words[tiles] = torch.ops.aten._convert_weight_to_int4pack(pairs, self._tiles_together)
        scales = codes.group_scales()
        offsets = scales * (MIDDLE_CODE - layout.zero)
        if layout.has_minimum:
            offsets += codes.group_minima()
        grid = torch.stack((scales, offsets), dim=-1).transpose(0, 1).to(self._grid.device, torch.bfloat16)
        self._grid[:, rows] = grid.repeat_interleave(len(self._grid) // len(grid), dim=0)


def _group_len(layouts: list[CodeLayout]) -> int | None:
    """The longest of the kernel's groups that crosses no group of any part."""
    lengths = [layout.group_len for layout in layouts]
    together = gcd(*(length for length in lengths if length is not None)) if None not in lengths else 1
    return next((length for length in GROUP_LENS if together % length == 0), None)


def _same(order: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if order is None or other is None:
        return order is other
    return torch.equal(order, other)


def _told(layout: CodeLayout) -> str:
    return "values of a table" if layout.values is not None else layout.code
