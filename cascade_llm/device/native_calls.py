"""Calls of compiled functions in a list that compiled code walks; see `replay.c`."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import REPLAY
from cascade_llm.errors import BackendError, CapacityError

__all__ = ["NativeCalls", "can_be_listed", "replay_function"]

MOST_INTEGERS, MOST_FLOATS = 16, 4
"""Arguments of a call, as the C file has room for."""


class _Call(ctypes.Structure):
    """`call` of the C file."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("returns", ctypes.c_long),
        ("integers", ctypes.c_long * MOST_INTEGERS),
        ("floats", ctypes.c_float * MOST_FLOATS),
    )


class NativeCalls:
    """Calls in order, and what their arguments point to."""

    def __init__(self, calls: Sequence[tuple[Any, Sequence[Any]]]) -> None:
        """`calls`: functions of `ctypes.CDLL` and their arguments, such as `can_be_listed` says yes to."""
        self._replay, self._count = replay_function(), len(calls)
        self._calls = (_Call * len(calls))(*(_listed(function, args) for function, args in calls))
        self._address = ctypes.addressof(self._calls)
        self._kept = [arg for _, args in calls for arg in args if _is_memory(arg)]

    def __call__(self) -> None:
        """Make them.

        Raises:
            CapacityError: a function returned that it had no memory for its work; those after it are not called
        """
        if self._replay(self._address, self._count):
            raise CapacityError("no memory for a step's products: lower max_num_seqs")


@functools.cache
def replay_function() -> NativeFunction:
    """What walks the list.

    Raises:
        BackendError: there is no native code here, or the system's calls put arguments elsewhere than the C file says
    """
    if sys.platform != "linux":
        raise BackendError(f"the list of a step's calls is for Linux's calling conventions, not {sys.platform}'s")
    (function,) = native_functions(REPLAY).values()
    function.declare(ctypes.c_void_p, ctypes.c_long, returns=ctypes.c_int)
    return function


def can_be_listed(function: Any) -> bool:
    """Whether a list has room for the arguments of a function of `ctypes.CDLL`: no doubles, not too many."""
    num_floats = sum(kind is ctypes.c_float for kind in function.argtypes)
    fits = num_floats <= MOST_FLOATS and len(function.argtypes) - num_floats <= MOST_INTEGERS
    return fits and ctypes.c_double not in function.argtypes


def _listed(function: Any, args: Sequence[Any]) -> _Call:
    call = _Call(function=ctypes.cast(function, ctypes.c_void_p).value, returns=function.restype is not None)
    num_integers = num_floats = 0
    for kind, arg in zip(function.argtypes, args, strict=True):
        if kind is ctypes.c_float:
            call.floats[num_floats] = arg
            num_floats += 1
        else:
            call.integers[num_integers] = ctypes.addressof(arg) if _is_memory(arg) else int(arg or 0)
            num_integers += 1
    return call


def _is_memory(arg: Any) -> bool:
    """Whether an argument is memory of ctypes, whose address is meant."""
    return isinstance(arg, (ctypes.Array, ctypes.Structure))
