"""The compiled products of packed matrices, and the structures that both sides share; see `packed.h`.

The products of a kind of code are a library of their own in a checkout, compiled when a matrix has that kind.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import (
    PACKED_FLOATS,
    PACKED_FRACTIONS,
    PACKED_INTEGERS,
    PACKED_LAYOUT,
    PACKED_PRODUCT,
    packed_tiles_unit,
)
from cascade_llm.errors import BackendError

__all__ = [
    "CODE_NUMBERS",
    "SCALE_NUMBERS",
    "PackedKernels",
    "Piece",
    "packed_kernels",
    "reason_against_packed",
    "tile_product",
]

CODE_NUMBERS = {name: number for number, name in enumerate((*PACKED_INTEGERS, *PACKED_FRACTIONS, *PACKED_FLOATS))}
"""`enum code` of the header; "table", "halved_table" and "fractions" are u4 with values."""
SCALE_NUMBERS = {None: 0, "float16": 1, "float32": 2, "sub": 3}
"""`enum scale`."""

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class Piece(ctypes.Structure):
    """`piece` of the header: a part of a matrix whose codes are of one kind."""

    _fields_ = (
        ("data", _pointer),
        ("multiply", _pointer),
        ("tile_bytes", _long),
        ("num_outputs", _long),
        ("first_output", _long),
        ("super_blocks", _long),
        ("code", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("zero", ctypes.c_int32),
        ("has_minimum", ctypes.c_int32),
        ("is_exact", ctypes.c_int32),
        ("values", ctypes.c_uint8 * 16),
        ("fractions", ctypes.c_float * 16),
    )


@dataclass(frozen=True)
class PackedKernels:
    """What is the same for all codes."""

    product: NativeFunction
    stack_product: NativeFunction
    tile_bytes: NativeFunction
    pack_tiles: NativeFunction
    rows: NativeFunction


def reason_against_packed(code: str = PACKED_INTEGERS[0], is_exact: bool = False) -> str | None:
    """Why there are no kernels here, or none for a code, or None; see `tile_product`."""
    try:
        packed_kernels()
        tile_product(code, is_exact)
    except BackendError as error:
        return str(error)
    return None


@functools.cache
def packed_kernels() -> PackedKernels:
    """The functions, of the library that serves this processor.

    Raises:
        BackendError: there is none, and none can be compiled
    """
    functions = {**native_functions(PACKED_LAYOUT), **native_functions(PACKED_PRODUCT)}
    piece = ctypes.POINTER(Piece)
    product, tile_bytes = functions["packed_product"], functions["packed_tile_bytes"]
    product.declare(_pointer, piece, _long, _pointer, _pointer, *[_long] * 3, *[_int] * 2, returns=_int)
    stack_product = functions["packed_stack_product"]
    stack_product.declare(
        *[_pointer] * 2,
        piece,
        _long,
        _pointer,
        _long,
        *[_pointer] * 2,
        *[_long] * 2,
        *[_int] * 2,
        returns=_int,
    )
    tile_bytes.declare(piece, _long, returns=_long)
    pack_tiles, rows = functions["pack_tiles"], functions["packed_rows"]
    pack_tiles.declare(piece, *[_pointer] * 5, _long, _long, _pointer, _int)
    rows.declare(piece, _pointer, _long, _long, _pointer, _int, _int)
    return PackedKernels(product, stack_product, tile_bytes, pack_tiles, rows)


@functools.cache
def tile_product(code: str, is_exact: bool) -> int:
    """The address of the products of one code, for `Piece.multiply`.

    Args:
        code: a key of `CODE_NUMBERS`
        is_exact: whether inputs are left as they are

    Raises:
        BackendError: there is none, and none can be compiled
    """
    (function,) = native_functions(packed_tiles_unit(code, is_exact)).values()
    return function.address
