"""The fields of a config.json, each read as what it must be."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as short_repr
from typing import Any

from cascade_llm.errors import CheckpointError

__all__ = ["ConfigFields"]

MAX_COUNT = 2**31 - 1
"""Of any dimension: what an index of 32 bits reaches."""
LARGEST = 1e30
"""Of any number."""


class ConfigFields:
    """One object of JSON; a field that is null is as one that is not there.

    Every reader raises `CheckpointError`, with the field's name, for a value that makes no sense.
    """

    def __init__(
        self, fields: Mapping[str, Any], *, where: str = "config.json", defaults: Mapping[str, Any] | None = None
    ) -> None:
        """`where`: how messages call the object; `defaults`: of fields that are not there."""
        stated = {**(defaults or {}), **fields}  # null where there is a default is no value, as transformers has it
        self._fields, self.where = {name: value for name, value in stated.items() if value is not None}, where

    def __contains__(self, name: str) -> bool:
        return name in self._fields

    def value(self, name: str) -> Any:
        """Whatever it is; None where it is not there."""
        return self._fields.get(name)

    def count(self, name: str, default: int | None = None, most: int = MAX_COUNT) -> int:
        """A positive integer."""
        value = self._fields.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.wrong(name, "an integer, 1 or larger")
        if value > most:
            raise self.wrong(name, f"at most {most:,}")
        return value

    def number(self, name: str, default: float | None = None, *, least: float | None = None) -> float:
        """A finite number, above `least`."""
        value: Any = self._fields.get(name, default)
        if not _is_number(value):
            raise self.wrong(name, "a number")
        if least is not None and value <= least:
            raise self.wrong(name, f"larger than {least:g}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._fields.get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def object(self, name: str) -> ConfigFields:
        """Another object; empty where it is not there."""
        value = self._fields.get(name, {})
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return ConfigFields(value, where=f"{self.where}: {name}")

    def objects(self) -> Mapping[str, ConfigFields]:
        """Those of its fields that are objects."""
        return {name: self.object(name) for name, value in self._fields.items() if isinstance(value, Mapping)}

    def texts(self, name: str) -> list[str]:
        """A list of texts; empty where it is not there."""
        value = self._fields.get(name, [])
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise self.wrong(name, "a list of texts")
        return list(value)

    def numbers(self, name: str, length: int, *, least: float | None = None) -> tuple[float, ...]:
        """A list of so many finite numbers, each above `least`."""
        value = self._fields.get(name)
        if not isinstance(value, list | tuple) or len(value) != length or not all(map(_is_number, value)):
            raise self.wrong(name, f"a list of {length} numbers")
        if least is not None and min(value) <= least:
            raise self.wrong(name, f"a list of numbers larger than {least:g}")
        return tuple(map(float, value))

    def indices(self, name: str, count: int) -> frozenset[int]:
        """A list of integers below `count`; empty where it is not there."""
        value = self._fields.get(name, [])
        is_list = isinstance(value, list | tuple)
        if not is_list or not all(type(item) is int and 0 <= item < count for item in value):
            raise self.wrong(name, f"a list of integers from 0 to {count - 1}")
        return frozenset(value)

    def wrong(self, name: str, wanted: str) -> CheckpointError:
        """That a field is not what it must be."""
        return CheckpointError(f"{self.where}: {name} is {short_repr(self.value(name))}: it must be {wanted}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
