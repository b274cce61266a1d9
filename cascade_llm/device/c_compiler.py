"""Compile a C file of this package for this processor, and load it into this process."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from pathlib import Path

from cascade_llm.errors import BackendError

__all__ = ["compile_library"]

COMPILER = "gcc"
"""GCC's OpenMP runtime is the one that torch has already loaded; another compiler's would bring a second pool."""
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def compile_library(source: Path, defines: tuple[str, ...]) -> ctypes.CDLL:
    """The library built from one C file; takes a second or less, and leaves nothing on disk.

    Args:
        defines: macros, as "NAME" or "NAME=value"

    Raises:
        BackendError: with the reason, where there is no compiler, or it fails, or the library would bring a second
            OpenMP runtime into the process
    """
    compiler = shutil.which(COMPILER)
    if compiler is None:
        raise BackendError(f"native code needs a C compiler, and {COMPILER} was not found")
    with tempfile.TemporaryDirectory(prefix="cascade_llm_") as folder:
        target = str(Path(folder) / f"{source.stem}.so")
        command = [compiler, *FLAGS, *(f"-D{define}" for define in defines), str(source), "-o", target, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"{source.name} did not compile: {done.stderr.strip()[:500]}")
        before = _openmp_runtimes()
        try:
            library = ctypes.CDLL(target)
        except OSError as error:
            raise BackendError(f"{source.name} did not load: {error}") from None
    if _openmp_runtimes() - before:
        raise BackendError("native code brought a second OpenMP runtime beside torch's")
    return library


def _openmp_runtimes() -> set[str]:
    """OpenMP runtimes that this process has loaded, by path; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return set()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "omp" in line}
    return {path for path in paths if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))}
