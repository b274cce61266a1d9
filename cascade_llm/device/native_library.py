"""Native code, loaded: from the library that the wheel carries for this processor's level, else compiled here.

A wheel holds one library for each level of processor, with all units of `native_units` in it. A source checkout holds
none, and neither holds units for unusual head sizes: these are compiled for the same level and kept in the user's
cache. All of them share the threads of one pool, which is the first thing loaded, with its names seen by the others.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cascade_llm.device.c_compiler import compile_library, describe_library_cache, find_compiler, load_library
from cascade_llm.device.cpu_levels import (
    LEVEL_VARIABLE,
    LEVELS,
    CpuLevel,
    architecture,
    levels_to_try,
    reason_against,
)
from cascade_llm.device.native_build import library_name
from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_units import PACKAGE, PARALLEL, NativeUnit
from cascade_llm.errors import BackendError

__all__ = ["describe_native_code", "native_functions", "serving_level"]

WHEEL_FOLDER = PACKAGE / "device" / "libraries"
"""Where the wheel has its libraries, `<architecture>-<level>.so`; a checkout has no such folder."""


@dataclass(frozen=True)
class _Serving:
    """The level that serves.

    Attributes:
        shipped: the wheel's library, None where the level's code is compiled here
        refused: higher levels that this processor has, and why they do not serve
    """

    level: CpuLevel
    shipped: ctypes.CDLL | None
    refused: Mapping[str, str]


def native_functions(unit: NativeUnit) -> Mapping[str, NativeFunction]:
    """The functions of a unit, by the names that its C file has for them.

    Raises:
        BackendError: with the reason, where neither the wheel holds it nor a compiler builds it, or its processor has
            not what it needs
        ConfigError: CASCADE_LLM_LEVEL names no level of this processor
    """
    serving = _serving()
    if not unit.fits(serving.level):
        raise BackendError(f"{unit.path.name} is for processors with {unit.flag}, and {serving.level.name} serves")
    library = serving.shipped
    if library is None or not all(hasattr(library, name) for name in unit.exported):
        library = compile_library(unit.path, (*serving.level.options, *unit.options), unit.exported)
    return {name: NativeFunction(library[full]) for name, full in zip(unit.functions, unit.exported, strict=True)}


def serving_level() -> CpuLevel | None:
    """The level that native code is built for here; None where there is no native code."""
    try:
        return _serving().level
    except BackendError:
        return None


def describe_native_code() -> dict[str, str | None]:
    """For `cascade-llm env`: the level, where its code comes from, why no higher one serves; text for a reader."""
    levels = LEVELS.get(architecture(), ())
    try:
        serving = _serving()
    except BackendError as error:
        return {"level": None, "source": None, "reason": str(error)}
    reasons = dict(serving.refused)
    for level in levels[levels.index(serving.level) + 1 :]:
        if reason := reason_against(level):
            reasons[level.name] = reason
        reasons.setdefault(level.name, f"{LEVEL_VARIABLE} asks for {serving.level.name}")
    return {
        "level": serving.level.name,
        "source": "the installed package" if serving.shipped else f"compiled here, {describe_library_cache()}",
        "reason": "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or None,
    }


def _serving() -> _Serving:
    return _find(find_compiler(), os.environ.get(LEVEL_VARIABLE), WHEEL_FOLDER)


@functools.cache
def _find(compiler: str | None, asked: str | None, folder: Path) -> _Serving:
    """The highest level whose pool of threads can be loaded; the arguments are what the answer depends on."""
    refused: dict[str, str] = {}
    for level in levels_to_try():
        try:
            return _Serving(level, _pool(level, folder), refused)
        except BackendError as error:
            refused[level.name] = str(error)
    reason = next(iter(refused.values()), f"there are no levels for {architecture()} with what this processor has")
    raise BackendError(reason)


def _pool(level: CpuLevel, folder: Path) -> ctypes.CDLL | None:
    """Load the level's threads: with the wheel's library, which is returned, or from source."""
    shipped = folder / library_name(architecture(), level)
    if shipped.is_file():
        return load_library(shipped, PARALLEL.exported, for_all=True)
    compile_library(PARALLEL.path, level.options, PARALLEL.exported, for_all=True)
    return None
