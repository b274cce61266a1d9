"""Compile a C file of this package, keep the library, and load it into this process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cascade_llm.device.user_cache import private_folder
from cascade_llm.device.watched_process import Patience, run_watched
from cascade_llm.errors import BackendError

__all__ = ["compile_library", "describe_library_cache", "find_compiler", "load_library", "run_compiler"]

COMPILERS = ("gcc", "clang", "cc")
"""The first that is found serves."""
FLAGS = ("-O3", "-std=gnu11", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
LINK_FLAGS = ("-shared", "-pthread", *(("-Wl,-undefined,dynamic_lookup",) if sys.platform == "darwin" else ()))
"""What is not in a library is found in those loaded before it, as the threads are."""
HEADERS = Path(__file__).parent
"""Where `parallel.h` lies, which every source may include."""
CACHE = "native"
"""The folder of compiled libraries in the user's cache."""
ASKED_ITS_VERSION, COMPILING = Patience(idle_s=10.0, computing_s=10.0), Patience(idle_s=60.0, computing_s=300.0)
"""A compiler that takes longer hangs: it is ended, and counts as missing."""


def compile_library(
    source: Path, options: tuple[str, ...], functions: tuple[str, ...], *, for_all: bool = False
) -> ctypes.CDLL:
    """The library built from one C file: compiled in seconds, and then kept in the user's cache.

    A file of the cache serves only the source, options and compiler that it was built with, and only with the very
    bytes that were written. Processes that ask at once wait for the one that builds it. Where there is no private
    folder for it, nothing is kept.

    Args:
        options: for the compiler: the processor's level, macros
        functions: what the library must hold
        for_all: whether libraries that are loaded later may call them

    Raises:
        BackendError: with the reason, where there is no compiler, or it fails or hangs
    """
    compiler = find_compiler()
    if compiler is None:
        raise BackendError(f"native code needs a C compiler, and none of {', '.join(COMPILERS)} was found")
    loaded = _loaded(compiler, (*FLAGS, *options), source, functions, for_all)
    if isinstance(loaded, str):
        raise BackendError(loaded)
    return loaded


def find_compiler() -> str | None:
    """The path of this machine's C compiler."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def load_library(path: Path, functions: tuple[str, ...], *, for_all: bool = False) -> ctypes.CDLL:
    """Load a compiled library; see `compile_library`. Raises `BackendError` where it is none, or lacks a function."""
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL if for_all else ctypes.RTLD_LOCAL)
    except OSError as error:
        raise BackendError(f"{path.name} did not load: {error}") from None
    if missing := [function for function in functions if not hasattr(library, function)]:
        raise BackendError(f"{path.name} was compiled without {', '.join(missing)}")
    return library


def describe_library_cache() -> str:
    """Where compiled libraries are kept, or why none are."""
    try:
        return f"kept in {private_folder(CACHE)}"
    except BackendError as error:
        return f"at each start: {error}"


@functools.cache
def _loaded(
    compiler: str, options: tuple[str, ...], source: Path, functions: tuple[str, ...], for_all: bool
) -> ctypes.CDLL | str:
    """The library, or the reason why there is none: a compiler that hangs is not asked twice."""
    try:
        with _library_file(compiler, options, source) as path:
            return load_library(path, functions, for_all=for_all)
    except BackendError as error:
        return str(error)
    except OSError as error:  # a full disk, a folder that is gone or read-only, a program of another machine
        return f"{source.name} did not compile: {error}"


@contextmanager
def _library_file(compiler: str, options: tuple[str, ...], source: Path) -> Iterator[Path]:
    """A file to load: of the cache, or one that is gone afterwards."""
    try:
        folder = private_folder(CACHE)
    except BackendError:
        with tempfile.TemporaryDirectory(prefix="cascade_llm_") as scratch:
            yield _compile(compiler, options, source, Path(scratch))
        return
    key = f"{source.stem}-{_key(compiler, options, source)}"
    kept = _kept(folder, key)
    if kept is None:
        with _turn(folder, key):
            kept = _kept(folder, key) or _build(compiler, options, source, folder, key)
    yield kept


def _build(compiler: str, options: tuple[str, ...], source: Path, folder: Path, key: str) -> Path:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = _compile(compiler, options, source, Path(scratch))
        return built.replace(folder / f"{key}-{_digest(built.read_bytes())}.so")


@contextmanager
def _turn(folder: Path, key: str) -> Iterator[None]:
    """Wait until no other process builds that library; where files cannot be locked, several build it, each its own."""
    import fcntl  # where there is none, nothing is kept

    path = folder / f"{key}.lock"
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _key(compiler: str, options: tuple[str, ...], source: Path) -> str:
    """Changes with whatever changes the library."""
    told = (*options, *LINK_FLAGS, compiler, _version(compiler), platform.machine())
    headers = (path.read_bytes() for folder in (HEADERS, source.parent) for path in sorted(folder.glob("*.h")))
    return _digest(source.read_bytes(), *headers, *(text.encode() for text in told))


def _kept(folder: Path, key: str) -> Path | None:
    """The library of that key; a file with other bytes than its name says is removed."""
    for path in folder.glob(f"{key}-*.so"):
        if path.stem == f"{key}-{_digest(path.read_bytes())}":
            return path
        path.unlink(missing_ok=True)
    return None


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _compile(compiler: str, options: tuple[str, ...], source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.so"
    command = [compiler, *options, *LINK_FLAGS, f"-I{HEADERS}", str(source), "-o", str(target), "-lm"]
    returned, output = run_compiler(command, folder)
    if returned or not target.is_file():
        reason = output.strip()[:500] or f"{compiler} ended with {returned} and wrote no library"
        raise BackendError(f"{source.name} did not compile: {reason}")
    return target


@functools.cache
def _version(compiler: str) -> str:
    return run_watched([compiler, "--version"], ASKED_ITS_VERSION)[1]


def run_compiler(command: list[str], scratch: Path) -> tuple[int, str]:
    """Exit status and output of a compiler that may write to `scratch`. Raises `BackendError` where it hangs."""
    return run_watched(command, COMPILING, {**os.environ, "TMPDIR": str(scratch)})
