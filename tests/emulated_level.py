"""Tests with the native code of another architecture, which qemu runs: a plugin of pytest.

    python -m pytest -p tests.emulated_level --emulate aarch64-i8mm tests/layers/test_fused_ops.py

A process of the emulator holds the libraries. It has this process's memory as an open file, and takes pages as a call
touches them (`emulated_calls.c`): so what calls native code is tested as it is, slowly.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cascade_llm.device import native_library
from cascade_llm.device.c_compiler import FLAGS, HEADERS, LINK_FLAGS
from cascade_llm.device.cpu_levels import LEVELS, CpuLevel
from cascade_llm.device.native_function import NativeFunction
from cascade_llm.device.native_units import PARALLEL, NativeUnit

COMPILERS = {"aarch64": "aarch64-linux-gnu-gcc"}
PROGRAM = Path(__file__).with_name("emulated_calls.c")
INTEGERS, FLOATS = 16, 4


def pytest_addoption(parser: pytest.Parser) -> None:
    """See pytest."""
    parser.addoption("--emulate", metavar="ARCHITECTURE-LEVEL", help="whose native code the tests take")


def pytest_configure(config: pytest.Config) -> None:
    """Before any module takes `native_functions` by its name."""
    if asked := config.getoption("--emulate"):
        architecture, _, name = asked.partition("-")
        (level,) = (level for level in LEVELS[architecture] if level.name == name)
        emulated = EmulatedLevel(architecture, level, Path(tempfile.mkdtemp(prefix="emulated_")))
        native_library.native_functions = emulated.functions  # type: ignore[assignment]
        config.add_cleanup(emulated.close)


class EmulatedLevel:
    """One level in a process of the emulator, to which the libraries of units are added as they are asked for.

    `close` it.
    """

    def __init__(self, architecture: str, level: CpuLevel, folder: Path) -> None:
        compiler, emulator = COMPILERS[architecture], f"qemu-{architecture}"
        self._command = [compiler, *FLAGS, *level.options, *LINK_FLAGS, f"-I{HEADERS}"]
        self._folder = folder
        program = folder / "calls"
        subprocess.run([compiler, "-O1", "-rdynamic", PROGRAM, "-o", program, "-ldl", "-pthread"], check=True)
        self._memory = os.open("/proc/self/mem", os.O_RDWR)
        self._process = subprocess.Popen(
            [emulator, "-L", f"/usr/{architecture}-linux-gnu", program, str(self._memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._memory,),
        )
        self.functions(PARALLEL)

    def functions(self, unit: NativeUnit) -> Mapping[str, NativeFunction]:
        """In place of `native_functions`."""
        library = self._folder / f"{unit.path.stem}{unit.suffix}.so"
        if not library.exists():
            subprocess.run([*self._command, *unit.options, unit.path, "-o", library, "-lm"], check=True)
            self.call(str(library), [], [])
        names = zip(unit.functions, unit.exported, strict=True)
        return {name: NativeFunction(_EmulatedFunction(self, full)) for name, full in names}

    def call(self, name: str, integers: list[int], floats: list[float]) -> int:
        """One call; arguments that are floats go another way than the rest."""
        integers = integers + [0] * (INTEGERS - len(integers))
        floats = floats + [0.0] * (FLOATS - len(floats))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(struct.pack(f"<256s{INTEGERS}q{FLOATS}f", name.encode(), *integers, *floats))
        self._process.stdin.flush()
        answer = self._process.stdout.read(8)
        assert len(answer) == 8, f"{name}: the emulator ended with {self._process.wait()}"
        return int(struct.unpack("<q", answer)[0])

    def close(self) -> None:
        """End the emulator."""
        self._process.communicate()
        os.close(self._memory)
        shutil.rmtree(self._folder)


class _EmulatedFunction:
    """In place of a function of a library that ctypes has loaded."""

    def __init__(self, level: EmulatedLevel, name: str) -> None:
        self._level, self._name = level, name
        self.argtypes: tuple[Any, ...] = ()
        self.restype: Any = None
        self._as_parameter_ = ctypes.c_void_p(level.call(f"&{name}", [], []))
        """Where calls in the emulator find it, for a cast to a pointer."""

    def __call__(self, *arguments: Any) -> int | None:
        assert len(arguments) == len(self.argtypes)
        integers, floats = [], []
        for kind, argument in zip(self.argtypes, arguments, strict=True):
            if kind is ctypes.c_float:
                floats.append(float(argument))
            else:
                integers.append(_integer(argument))
        result = self._level.call(self._name, integers, floats)
        return None if self.restype is None else int(self.restype(result).value)


def _integer(argument: Any) -> int:
    """A number, or the address of what ctypes would pass by one."""
    if argument is None:
        return 0
    if isinstance(argument, int):
        return int(argument)
    if isinstance(argument, ctypes.c_void_p):
        return argument.value or 0
    target = getattr(argument, "_obj", argument)  # byref's
    return ctypes.addressof(target)
