"""A compiled function, as Python calls it; whoever records a stretch of work is told of each call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["NativeFunction", "OnNativeCall", "told_native_calls"]

OnNativeCall = Callable[[Callable[..., Any], tuple[Any, ...]], None]
"""Told the bare function, and what it is called with."""

_listener: ContextVar[OnNativeCall | None] = ContextVar("on_native_call", default=None)


class NativeFunction:
    """One function of a compiled library; the types of its arguments are set by whoever knows its C file."""

    __slots__ = ("_function",)

    def __init__(self, function: Any) -> None:
        """`function`: of a `ctypes.CDLL`."""
        self._function = function

    def declare(self, *argument_types: Any, returns: Any = None) -> None:
        """Say what it takes and returns, as types of ctypes; None returns nothing."""
        self._function.argtypes, self._function.restype = argument_types, returns

    @property
    def address(self) -> int:
        """Where it lies, for C code that calls it."""
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        assert address is not None
        return address

    def __call__(self, *args: Any) -> Any:
        """Call it."""
        if (listener := _listener.get()) is not None:
            listener(self._function, args)
        return self._function(*args)


@contextmanager
def told_native_calls(on_call: OnNativeCall) -> Iterator[None]:
    """Until the block ends, `on_call` hears of each call of this thread before it is made."""
    token = _listener.set(on_call)
    try:
        yield
    finally:
        _listener.reset(token)
