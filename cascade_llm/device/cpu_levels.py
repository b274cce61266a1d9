"""Levels of processors: what native code may assume, from the flags that the system names.

A level is a set of instructions with a name. Libraries are built for levels and not for one machine's processor, so
that the wheel can carry them; which level serves is found at run time. Standard library only: the build of the wheel
reads this too.
"""

from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cascade_llm.device.tile_data import reason_against_tiles
from cascade_llm.errors import ConfigError

__all__ = ["LEVELS", "LEVEL_VARIABLE", "CpuLevel", "architecture", "levels_to_try", "processor_flags", "reason_against"]

LEVEL_VARIABLE = "CASCADE_LLM_LEVEL"
"""Holds a process to a lower level than its processor has; for tests."""


@dataclass(frozen=True)
class CpuLevel:
    """One level.

    Attributes:
        name: also the name of its library in the wheel
        options: how a compiler is told
        flags: what the system must name in /proc/cpuinfo, all of them
    """

    name: str
    options: tuple[str, ...]
    flags: frozenset[str]


def _level(name: str, options: str, flags: str, below: CpuLevel | None = None) -> CpuLevel:
    """A level that has what the one below has, and more."""
    return CpuLevel(name, tuple(options.split()), frozenset(flags.split()) | (below.flags if below else frozenset()))


_V2 = _level("baseline", "-march=x86-64-v2", "pni ssse3 sse4_1 sse4_2 popcnt cx16")
_V3 = _level("avx2", "-march=x86-64-v3", "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave", _V2)
_VNNI = _level("avxvnni", "-march=x86-64-v3 -mavxvnni", "avx_vnni", _V3)
_V4_FLAGS = "avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"
_V4 = _level("avx512", "-march=x86-64-v4 -mavx512vnni", _V4_FLAGS, _V3)
_BF16 = _level("avx512bf16", "-march=x86-64-v4 -mavx512vnni -mavx512bf16", "avx512_bf16", _V4)
_AMX_OPTIONS = f"{' '.join(_BF16.options)} -mamx-tile -mamx-int8 -mamx-bf16"
_AMX = _level("amx", _AMX_OPTIONS, "amx_tile amx_int8 amx_bf16", _BF16)
_ARM = _level("baseline", "-march=armv8-a", "asimd")
_DOT = _level("dotprod", "-march=armv8.2-a+dotprod", "asimddp", _ARM)
_I8MM = _level("i8mm", "-march=armv8.2-a+dotprod+i8mm+bf16", "i8mm bf16", _DOT)

LEVELS: Mapping[str, tuple[CpuLevel, ...]] = {
    "x86_64": (_V2, _V3, _VNNI, _V4, _BF16, _AMX),
    "aarch64": (_ARM, _DOT, _I8MM),
}
"""By architecture, lowest first."""


def architecture() -> str:
    """This machine's, as `LEVELS` spells it, or what the system says where there are none."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


@functools.cache
def processor_flags() -> frozenset[str]:
    """What this processor can do, in the words of /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        # Apple's processors all have these; of others nothing is known but their architecture's first version
        arm = "asimd asimddp" if sys.platform == "darwin" else "asimd"
        return frozenset(arm.split()) if architecture() == "aarch64" else frozenset()
    named = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(named[0].split()) if named else frozenset()


def reason_against(level: CpuLevel) -> str | None:
    """Why a level cannot serve here, or None: its instructions are missing, or the kernel refuses their registers."""
    if missing := level.flags - processor_flags():
        return f"the processor lacks {', '.join(sorted(missing))}"
    return reason_against_tiles() if "amx_tile" in level.flags else None


def levels_to_try() -> tuple[CpuLevel, ...]:
    """The levels that can serve here, highest first, down from the one that CASCADE_LLM_LEVEL names.

    Raises:
        ConfigError: it names none, or one that cannot serve here
    """
    levels = LEVELS.get(architecture(), ())
    asked = os.environ.get(LEVEL_VARIABLE)
    if asked:
        names = [level.name for level in levels]
        if asked not in names:
            raise ConfigError(f"{LEVEL_VARIABLE} is {asked!r}: it must be one of {', '.join(names) or 'none'}")
        levels = levels[: names.index(asked) + 1]
        if reason := reason_against(levels[-1]):
            raise ConfigError(f"{LEVEL_VARIABLE} is {asked!r}, but {reason}")
    return tuple(level for level in reversed(levels) if reason_against(level) is None)
