"""What a wheel is told of its compiler and its libraries."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cascade_llm.device.c_compiler import LINK_FLAGS, find_compiler
from cascade_llm.device.cpu_levels import LEVELS, architecture
from cascade_llm.device.native_build import OLDEST_GLIBC, compiler_architecture, needed_glibc
from tests.native_code import needs_compiler

CROSS_COMPILER = "aarch64-linux-gnu-gcc"


def script(folder: Path, answer: str) -> list[str]:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\necho {answer}\n")
    path.chmod(0o700)
    return [str(path)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("x86_64-redhat-linux", "x86_64"),
        ("aarch64-unknown-linux-gnu", "aarch64"),
        ("arm64-apple-darwin24.1.0", "aarch64"),
        ("riscv64-linux-gnu", None),
        ("", None),
    ],
)
def test_a_compiler_tells_what_it_builds_for(answer: str, expected: str | None, tmp_path: Path) -> None:
    assert compiler_architecture(script(tmp_path, answer)) == expected


@needs_compiler
def test_this_machine_s_compiler_builds_for_it() -> None:
    compiler = find_compiler()
    assert compiler is not None
    assert compiler_architecture([compiler]) == architecture()
    if shutil.which(CROSS_COMPILER):
        assert compiler_architecture([CROSS_COMPILER]) in LEVELS


def library(folder: Path, *needs: bytes) -> Path:
    """The names as a library's table of strings has them."""
    path = folder / f"{len(needs)}.so"
    path.write_bytes(b"\x7fELF\0" + b"\0".join((b"libc.so.6", *needs, b"")))
    return path


def test_the_newest_glibc_that_is_asked_for_is_needed(tmp_path: Path) -> None:
    one, two = library(tmp_path, b"GLIBC_2.2.5", b"GLIBC_2.27"), library(tmp_path, b"GLIBC_2.17", b"GLIBC_2.4", b"x")
    assert needed_glibc([one, two]) == 27
    assert needed_glibc([library(tmp_path, b"GLIBC_2.2.5")]) == OLDEST_GLIBC
    assert needed_glibc([library(tmp_path)]) is None
    assert needed_glibc([]) is None


@needs_compiler
def test_what_the_linker_writes_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.c").write_text("#include <stdlib.h>\nvoid *memory(void) { return malloc(3); }\n")
    compiler = find_compiler()
    assert compiler is not None
    subprocess.run([compiler, "-fPIC", *LINK_FLAGS, tmp_path / "x.c", "-o", tmp_path / "x.so"], check=True)
    found = needed_glibc([tmp_path / "x.so"])
    assert found is None or found >= OLDEST_GLIBC  # none where the system's library is another one
