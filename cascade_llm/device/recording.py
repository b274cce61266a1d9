"""What a stretch of Python called on the host, kept to be called again without the Python: a CUDA graph's twin.

While a recording runs, every compiled function tells its address and arguments, and torch's dispatcher shows every
operation that reaches it (`TorchDispatchMode`). Memory comes from an arena, so that a replay finds each tensor at its
address. A replay calls the same functions in the same order, those of compiled code from a list that C walks: what the
stretch reads from memory may have changed since, what it read from Python may not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from cascade_llm.device.arena import Arena
from cascade_llm.device.devices import thread_limit
from cascade_llm.device.native_calls import NativeCalls, can_be_listed
from cascade_llm.device.native_function import told_native_calls

__all__ = ["NotRecordable", "Recording"]

READ_BY_PYTHON = ("resolve_conj", "resolve_neg", "item")
"""What torch calls before `tolist`, `numpy` and `item` read a tensor's memory."""


class NotRecordable(Exception):
    """The stretch does what depends on values that Python reads from tensors."""


class Recording:
    """Calls in order. It is made by running them once."""

    def __init__(self, arena: Arena) -> None:
        """Empty; `arena` must outlive it."""
        self._arena = arena
        self._steps: list[Callable[[], None]] = []
        self._listed: list[tuple[Any, tuple[Any, ...]]] = []
        self._result: torch.Tensor | None = None

    def record(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run `work`, and note what it calls; its result is where every replay leaves its own.

        Raises:
            NotRecordable: with the reason; nothing can be replayed then
        """
        with ExitStack() as stack:
            stack.enter_context(told_native_calls(self._note_native))
            stack.enter_context(_Dispatched(self._arena, self._note))
            self._result = work()
        self._close_list()
        return self._result

    def replay(self) -> None:
        """Make the same calls, on the same memory.

        Raises:
            CapacityError: a function had no memory for its work
        """
        for step in self._steps:
            step()

    def _note(self, operation: Callable[[], None]) -> None:
        self._close_list()
        self._steps.append(operation)

    def _note_native(self, function: Any, args: tuple[Any, ...]) -> None:
        if not can_be_listed(function):
            raise NotRecordable("a compiled function takes arguments that a list has no room for")
        self._listed.append((function, args))

    def _close_list(self) -> None:
        """Calls of compiled code that follow each other are one step."""
        if self._listed:
            self._steps.append(NativeCalls(self._listed))
            self._listed = []


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes torch's operations as calls that write where the first one wrote."""

    def __init__(self, arena: Arena, note: Callable[[Callable[[], None]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arena, self._note = arena, note

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler to have it leave this class out, 70 MB and a second at the first use."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        if name in READ_BY_PYTHON:
            raise NotRecordable(f"Python reads a tensor ({name})")
        with self:
            decomposed = func.decompose(*args, **kwargs)
        if decomposed is not NotImplemented:
            return decomposed
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._note(partial(_run, func, torch.get_num_threads(), *self._held(args, kwargs)))
            return result
        if not isinstance(result, torch.Tensor):
            if isinstance(result, (list, tuple)) and all(_is_view(part, args) for part in result):
                return result
            raise NotRecordable(f"{name} returns no tensor")
        if _is_view(result, args):
            return result
        kept = self._arena.empty(result.shape, result.stride(), result.dtype)
        if not name.startswith(("empty", "new_empty")):
            kept.copy_(result)
            out = self._arena.twin(kept)
            self._note(partial(_run_into, func, torch.get_num_threads(), out, *self._held(args, kwargs)))
        return kept

    def _held(self, *arguments: Any) -> tuple[Any, ...]:
        """The arguments, to be kept without keeping the arena's blocks from other tensors."""
        held: tuple[Any, ...] = tree_map(lambda x: self._arena.twin(x) if isinstance(x, torch.Tensor) else x, arguments)
        return held


def _is_view(result: Any, args: Sequence[Any]) -> bool:
    """Whether a result is memory of an argument."""
    if not isinstance(result, torch.Tensor):
        return False
    address = result.untyped_storage().data_ptr()
    tensors = (arg for arg in tree_leaves(args) if isinstance(arg, torch.Tensor) and arg.layout == torch.strided)
    return any(arg.untyped_storage().data_ptr() == address for arg in tensors)


def _run(func: Any, num_threads: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    with thread_limit(num_threads):
        func(*args, **kwargs)


def _run_into(func: Any, num_threads: int, out: torch.Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    with thread_limit(num_threads):
        out.copy_(func(*args, **kwargs))
