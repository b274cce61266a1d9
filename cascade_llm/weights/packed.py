"""Matrices in the bits that they are stored in, on any processor: a decode step reads those bytes and no more.

Each part of a matrix keeps its own kind of code, so that a file of mixed block types stays as it is. By default the
inputs of a product are rounded to 8 bits per 32 of them, as llama.cpp does, since processors multiply small integers
several times as fast; `WeightOptions.exact_activations` leaves them as they are. Codes that are floats are exact in
any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from cascade_llm.device.huge_pages import MemoryRange
from cascade_llm.device.native_units import PACKED_FRACTIONS, PACKED_INTEGERS
from cascade_llm.errors import CapacityError
from cascade_llm.weights.codes import ROWS_TOGETHER, SUPER_LEN, CodeLayout, Codes
from cascade_llm.weights.format import MatrixSpec, StoredTensor, WeightFormat
from cascade_llm.weights.packed_kernels import (
    CODE_NUMBERS,
    SCALE_NUMBERS,
    Piece,
    packed_kernels,
    reason_against_packed,
    tile_product,
)

__all__ = ["Packed", "codes_in"]

BLOCK_LEN, HALF_LEN, TILE_LEN = 32, 16, 16
"""Inputs of a block and of its half, and outputs of a tile, in the C file."""
CHUNK_LEN = 1 << 20
"""Weights that stand as codes at a time, while a matrix is packed."""
SCALED_CODES = (*PACKED_INTEGERS, *PACKED_FRACTIONS, "float8_e4m3fn", "float8_e5m2")
"""Codes that have scales; the other floats have none."""
HALVED_CODES = ("u2", "u3", "u6", "halved_table")
"""Codes of which half a block shares a scale."""
TABLE_VALUES = range(-128, 128)
"""What the 16 numbers of a table of integers may be; other tables are of fractions."""
FRACTIONS = "fractions"
SLOW_FRACTIONS = "a table of fractions multiplies inputs as they are: prompts are slower than of decoded weights"
"""Of NF4 and FP4; decision 0040."""
DTYPES = (torch.float32, torch.bfloat16)
"""Of the inputs and outputs of a product."""


class Packed(WeightFormat):
    """Pieces of tiles, as `packed.h` has them."""

    name = "packed"

    def __init__(self, spec: MatrixSpec, parts: Mapping[str, StoredTensor]) -> None:
        """Pack the codes of all parts; few of them stand beside their tiles at a time."""
        self.spec = spec
        self._product, self._rows = packed_kernels().product, packed_kernels().rows
        self._in_features, self._out_features = spec.in_features, spec.out_features
        self._dtype = spec.options.dtype
        self._is_bfloat16 = self._dtype == torch.bfloat16
        exact = spec.options.exact_activations
        packed = [_PackedPart(spec.rows_of(name).start, parts[name], exact) for name in spec.parts]
        self.layouts = [part.layout for part in packed]
        """Of the parts."""
        self._tiles = [part.tiles for part in packed]
        in_order = [part.piece for part in packed if part.input_order is None]
        self._groups: list[tuple[torch.Tensor | None, Any]] = [(None, _array(in_order))] if in_order else []
        """Pieces that take the inputs in the same order, and that order."""
        self._groups += [(p.input_order, _array([p.piece])) for p in packed if p.input_order is not None]

    @staticmethod
    def reasons_against(spec: MatrixSpec, parts: Mapping[str, StoredTensor]) -> list[str]:
        """The device, the dtype, the shape, codes that nobody implements, or kernels that are missing."""
        options = spec.options
        if options.on_stream or options.device.type != "cpu":
            return [f"its kernels are for the CPU, the device is {options.device.type}"]
        if options.dtype not in DTYPES:
            return [f"its kernels take float32 and bfloat16, not {str(options.dtype).removeprefix('torch.')}"]
        if spec.in_features % BLOCK_LEN:
            return [f"{spec.name} has {spec.in_features} inputs, which are no blocks of {BLOCK_LEN}"]
        for stored in parts.values():
            if reason := _reason_against(stored, spec.in_features, options.exact_activations):
                return [reason]
        return []

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `WeightFormat`."""
        x = x.contiguous()
        rows, in_features = x.shape
        assert x.dtype == self._dtype
        assert in_features == self._in_features
        y = out if out is not None and out.is_contiguous() else x.new_empty(rows, self._out_features)
        for order, pieces in self._groups:
            ordered = x if order is None else x.index_select(1, order)
            failed = self._product(
                ordered.data_ptr(),
                pieces,
                len(pieces),
                None if bias is None else bias.data_ptr(),
                y.data_ptr(),
                rows,
                in_features,
                self._out_features,
                self._is_bfloat16,
                torch.get_num_threads(),
            )
            if failed:
                raise CapacityError(f"no memory for the inputs of {rows} rows: lower max_num_batched_tokens")
        return y if out is None or y is out else out.copy_(y)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows [n, in_features] of int64 `ids` [n], in the products' dtype; of a matrix of one part."""
        ids = ids.contiguous()
        rows = torch.empty(len(ids), self.spec.in_features, dtype=self.spec.options.dtype)
        ((_, pieces),) = self._groups
        self._rows(
            pieces,
            ids.data_ptr(),
            len(ids),
            self.spec.in_features,
            rows.data_ptr(),
            self._is_bfloat16,
            torch.get_num_threads(),
        )
        return rows

    @property
    def pieces(self) -> list[Piece] | None:
        """All of them, to be used while the matrix lives; None where a part takes its inputs in another order."""
        if any(order is not None for order, _ in self._groups):
            return None
        ((_, pieces),) = self._groups
        return list(pieces)

    @property
    def num_bytes(self) -> int:
        """See `WeightFormat`."""
        return sum(tiles.nbytes for tiles in self._tiles)

    @property
    def memory(self) -> tuple[MemoryRange, ...]:
        """See `WeightFormat`."""
        return tuple(MemoryRange(tiles.data_ptr(), tiles.nbytes) for tiles in self._tiles)

    @property
    def note(self) -> str | None:
        """See `WeightFormat`."""
        return SLOW_FRACTIONS if any(_code_of(layout) == FRACTIONS for layout in self.layouts) else None

    def describe(self) -> str:
        """The codes, and how they multiply."""
        codes = "+".join(dict.fromkeys(layout.code for layout in self.layouts))
        is_rounded = not all(_is_exact(layout, self.spec.options.exact_activations) for layout in self.layouts)
        return f"{codes} ({'inputs rounded to 8 bits' if is_rounded else 'exact'})"


class _PackedPart:
    """The tiles of one part, and what the kernels are told of them."""

    def __init__(self, first_output: int, stored: StoredTensor, exact: bool) -> None:
        num_rows, in_features = stored.shape
        first = codes_in(stored, slice(0, 1))
        self.layout, self.input_order = first.layout, first.input_order
        self.piece = _piece_of(self.layout, num_rows, in_features, first_output, exact)
        num_pairs = -(-num_rows // (2 * TILE_LEN))
        self.tiles = torch.empty(2 * num_pairs, self.piece.tile_bytes, dtype=torch.uint8)
        self.tiles[num_rows // TILE_LEN :] = 0  # the last pair may be half empty
        self.piece.data = self.tiles.data_ptr()
        step = max(1, CHUNK_LEN // in_features // ROWS_TOGETHER) * ROWS_TOGETHER
        for row in range(0, num_rows, step):
            self._pack(codes_in(stored, slice(row, row + step)), self.tiles[row // TILE_LEN :])

    def _pack(self, codes: Codes, tiles: torch.Tensor) -> None:
        number = torch.float32 if codes.layout.scale == "float32" else torch.float16
        numbers = [_contiguous(numbers, number) for numbers in (codes.scales, codes.minima)]
        numbers += [_contiguous(numbers, torch.int8) for numbers in (codes.sub_scales, codes.sub_minima)]
        values = codes.codes.contiguous()
        codes.check()
        packed_kernels().pack_tiles(
            self.piece,
            values.data_ptr(),
            *(None if n is None else n.data_ptr() for n in numbers),
            *values.shape,
            tiles.data_ptr(),
            torch.get_num_threads(),
        )


def _array(pieces: list[Piece]) -> Any:
    return (Piece * len(pieces))(*pieces)


def codes_in(stored: StoredTensor, rows: slice) -> Codes:
    """The codes of some rows; plain values are codes of their own."""
    if stored.codes is not None:
        return stored.codes(stored.data[rows])
    values = stored.data[rows]
    return Codes(CodeLayout(str(values.dtype).removeprefix("torch."), group_len=None), values)


def _reason_against(stored: StoredTensor, in_features: int, exact: bool) -> str | None:
    if stored.codes is None and stored.decode is not None:
        return f"{stored.format} has no kernel: it is decoded as it is loaded"
    layout = codes_in(stored, slice(0, 1)).layout
    code = _code_of(layout)
    if code not in CODE_NUMBERS:
        return f"there is no kernel for {code}"
    if (layout.group_len is None) == (code in SCALED_CODES):
        return f"there is no kernel for {code} {'without' if layout.group_len is None else 'with'} scales"
    group_len, halved = layout.group_len or BLOCK_LEN, code in HALVED_CODES
    if layout.scale == "sub":
        fits = in_features % SUPER_LEN == 0 and group_len == (HALF_LEN if halved else BLOCK_LEN)
    else:
        fits = group_len == HALF_LEN if halved else group_len % BLOCK_LEN == 0 and in_features % group_len == 0
    if not fits:
        return f"there is no kernel for groups of {layout.group_len} in {in_features} inputs of {code}"
    return reason_against_packed(code, _is_exact(layout, exact))


def _code_of(layout: CodeLayout) -> str:
    """A key of `CODE_NUMBERS`, if there are kernels for it."""
    if layout.values is None:
        return layout.code
    if any(value not in TABLE_VALUES for value in layout.values):
        return FRACTIONS
    return "halved_table" if layout.group_len == HALF_LEN else "table"


def _is_exact(layout: CodeLayout, exact: bool) -> bool:
    """Whether products leave the inputs as they are: where that is asked for, and where codes are floats."""
    return exact or _code_of(layout) not in PACKED_INTEGERS


def _piece_of(layout: CodeLayout, num_rows: int, in_features: int, first_output: int, exact: bool) -> Piece:
    code, is_exact = _code_of(layout), _is_exact(layout, exact)
    super_len = SUPER_LEN if layout.scale == "sub" else layout.group_len or BLOCK_LEN
    piece = Piece(
        multiply=tile_product(code, is_exact),
        num_outputs=num_rows,
        first_output=first_output,
        super_blocks=max(1, super_len // BLOCK_LEN),
        code=CODE_NUMBERS[code],
        scale=SCALE_NUMBERS[layout.scale if layout.group_len is not None else None],
        zero=layout.zero + (128 if code in ("table", "halved_table") else 0),
        has_minimum=layout.has_minimum,
        is_exact=is_exact,
    )
    for index, value in enumerate(layout.values or ()):
        if code == FRACTIONS:
            piece.fractions[index] = value
        else:
            piece.values[index] = int(value) + 128
    piece.tile_bytes = packed_kernels().tile_bytes(piece, in_features)
    return piece


def _contiguous(numbers: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if numbers is None else numbers.to(dtype).contiguous()
