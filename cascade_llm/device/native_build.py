"""Build the libraries that the wheel carries: for each level of an architecture one, with all units in it.

Standard library only: `setup.py` runs this, where nothing is installed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cascade_llm.device.c_compiler import (
    ASKED_ITS_VERSION,
    FLAGS,
    HEADERS,
    LINK_FLAGS,
    find_compiler,
    run_compiler,
)
from cascade_llm.device.cpu_levels import LEVELS, CpuLevel
from cascade_llm.device.native_units import NativeUnit, units_of_wheel
from cascade_llm.device.watched_process import run_watched
from cascade_llm.errors import BackendError

__all__ = ["build_libraries", "compiler_architecture", "compiler_command", "library_name", "needed_glibc"]

OLDEST_GLIBC = 17
"""2.17 is the first that platform tags name for aarch64, and older than what Python 3.11 runs on."""


def library_name(architecture: str, level: CpuLevel) -> str:
    """The file of one level."""
    return f"{architecture}-{level.name}.so"


def compiler_command() -> list[str] | None:
    """The compiler of CC, which may have arguments and may build for another machine, else this machine's own."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked and shutil.which(asked[0]):
        return asked
    found = find_compiler()
    return None if found is None else [found]


def compiler_architecture(compiler: list[str]) -> str | None:
    """What a compiler builds for, as `LEVELS` spells it; None where it does not tell, or it is none of them."""
    _, output = run_watched([*compiler, "-dumpmachine"], ASKED_ITS_VERSION)
    machine = output.strip().partition("-")[0]
    return {"arm64": "aarch64"}.get(machine, machine if machine in LEVELS else None)


def needed_glibc(libraries: Iterable[Path]) -> int | None:
    """The x of the oldest glibc 2.x that has all that these libraries ask of it; None where they ask for no glibc."""
    asked = [int(number) for path in libraries for number in re.findall(rb"\0GLIBC_2\.(\d+)", path.read_bytes())]
    return max(OLDEST_GLIBC, *asked) if asked else None


def build_libraries(compiler: list[str], architecture: str, folder: Path) -> list[Path]:
    """The libraries of all levels of an architecture, written to `folder`; a minute on two cores.

    Args:
        compiler: program and arguments that build for that architecture
        architecture: a key of `LEVELS`

    Raises:
        BackendError: a file does not compile; with what the compiler says
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="cascade_llm_") as scratch, ThreadPoolExecutor(os.cpu_count()) as threads:
        return [_build(compiler, architecture, level, folder, Path(scratch), threads) for level in LEVELS[architecture]]


def _build(
    compiler: list[str], architecture: str, level: CpuLevel, folder: Path, scratch: Path, threads: ThreadPoolExecutor
) -> Path:
    objects = scratch / level.name
    objects.mkdir()
    units = [unit for unit in units_of_wheel() if unit.fits(level)]
    running = [
        threads.submit(_run, [*compiler, *_compilation(unit, level), "-o", str(objects / f"{number}.o")], objects)
        for number, unit in enumerate(units)
    ]
    for future in running:
        future.result()
    library = folder / library_name(architecture, level)
    _run([*compiler, *LINK_FLAGS, "-s", *map(str, sorted(objects.glob("*.o"))), "-o", str(library), "-lm"], objects)
    return library


def _compilation(unit: NativeUnit, level: CpuLevel) -> Iterator[str]:
    yield from (*FLAGS, *level.options, *unit.options, f"-I{HEADERS}", "-c", str(unit.path))


def _run(command: list[str], scratch: Path) -> None:
    returned, output = run_compiler(command, scratch)
    if returned:
        raise BackendError(f"{' '.join(command)} ended with {returned}: {output.strip()[:2000]}")
