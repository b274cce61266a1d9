"""The compiled products of packed matrices: `packed_product.c`, and the structure that both sides share."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from cascade_llm.device.c_compiler import compile_library
from cascade_llm.errors import BackendError

__all__ = ["CODE_NUMBERS", "SCALE_NUMBERS", "Piece", "packed_kernels", "reason_against_packed"]

SOURCE = Path(__file__).with_name("packed_product.c")
FUNCTIONS = ("packed_product", "packed_tile_bytes", "pack_tiles", "packed_rows")
TABLE = "table"
CODES = ("u2", "u3", "u4", "u5", "u6", "u8", TABLE, "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32")
CODE_NUMBERS = {name: number for number, name in enumerate(CODES)}
"""`enum code` of the C file; "table" is u4 with values."""
SCALE_NUMBERS = {None: 0, "float16": 1, "float32": 2, "sub": 3}
"""`enum scale`."""

_pointer, _long, _int = ctypes.c_void_p, ctypes.c_long, ctypes.c_int


class Piece(ctypes.Structure):
    """`piece` of the C file: a part of a matrix whose codes are of one kind."""

    _fields_ = (
        ("data", _pointer),
        ("tile_bytes", _long),
        ("num_outputs", _long),
        ("first_output", _long),
        ("super_blocks", _long),
        ("code", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("zero", ctypes.c_int32),
        ("has_minimum", ctypes.c_int32),
        ("values", ctypes.c_uint8 * 16),
    )


def reason_against_packed() -> str | None:
    """Why there are no kernels here, or None."""
    try:
        packed_kernels()
    except BackendError as error:
        return str(error)
    return None


@functools.cache
def packed_kernels() -> ctypes.CDLL:
    """The library, compiled once per machine in some seconds.

    Raises:
        BackendError: the machine cannot compile or load it
    """
    library = compile_library(SOURCE, (), FUNCTIONS)
    piece = ctypes.POINTER(Piece)
    library.packed_product.argtypes = (_pointer, piece, _long, _pointer, _pointer, *[_long] * 3, *[_int] * 3)
    library.packed_product.restype = _int
    library.packed_tile_bytes.argtypes = (piece, _long)
    library.packed_tile_bytes.restype = _long
    library.pack_tiles.argtypes = (piece, *[_pointer] * 5, _long, _long, _pointer, _int)
    library.pack_tiles.restype = None
    library.packed_rows.argtypes = (piece, _pointer, _long, _long, _pointer, _int, _int)
    library.packed_rows.restype = None
    return library
