from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade_llm.device import c_compiler
from cascade_llm.device.c_compiler import compile_library, describe_library_cache
from cascade_llm.device.user_cache import private_folder
from cascade_llm.device.watched_process import Patience
from cascade_llm.errors import BackendError

GCC = shutil.which("gcc")
needs_compiler = pytest.mark.skipif(GCC is None, reason="no C compiler here")
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells what a process has computed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of its own for each test, and nothing remembered of another's compiler."""
    monkeypatch.setenv("CASCADE_LLM_CACHE", str(tmp_path / "cache"))
    remembered = (c_compiler._loaded, c_compiler._version)
    for function in remembered:
        function.cache_clear()
    yield tmp_path / "cache" / "native"
    for function in remembered:
        function.cache_clear()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "answer.c"
    path.write_text("int answer(void) { return ANSWER; }\n")
    return path


def answer(source: Path, value: int = 42) -> int:
    """Compiled, or found, as another process would."""
    c_compiler._loaded.cache_clear()
    return int(compile_library(source, (f"-DANSWER={value}",), ("answer",)).answer())


def programs_named(word: str) -> str:
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.count(word)


def compiler_that(monkeypatch: pytest.MonkeyPatch, folder: Path, script: bytes) -> None:
    """Put a program in the place of gcc."""
    folder.mkdir()
    program = folder / "gcc"
    program.write_bytes(script)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@needs_compiler
def test_a_library_is_compiled_once_and_kept_in_a_private_folder(source: Path, cache: Path) -> None:
    assert answer(source) == 42
    (kept,) = cache.iterdir()
    written = kept.stat().st_mtime_ns
    assert answer(source) == 42
    assert kept.stat().st_mtime_ns == written
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert str(cache) in describe_library_cache()


@needs_compiler
def test_what_changes_the_library_has_a_file_of_its_own(
    source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (answer(source, 1), answer(source, 2)) == (1, 2)
    source.write_text("int answer(void) { return ANSWER + 10; }\n")
    assert answer(source, 1) == 11
    source.with_name("more.h").write_text("enum { MORE = 100 };\n")
    source.write_text('#include "more.h"\nint answer(void) { return ANSWER + MORE; }\n')
    assert answer(source, 1) == 101
    source.with_name("more.h").write_text("enum { MORE = 200 };\n")
    assert answer(source, 1) == 201
    monkeypatch.setattr("platform.machine", lambda: "another")
    assert answer(source, 1) == 201
    monkeypatch.setattr(c_compiler, "_version", lambda compiler: "gcc 99")
    assert answer(source, 1) == 201
    assert len(list(cache.iterdir())) == 7


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None], ids=["empty", "cut off", "another library"])
def test_a_damaged_file_is_built_again(source: Path, cache: Path, damage: bytes | None) -> None:
    assert answer(source) == 42
    (kept,) = cache.iterdir()
    if damage is None:
        answer(source, 7)
        damage = next(path for path in cache.iterdir() if path != kept).read_bytes()
    kept.unlink()
    kept.write_bytes(damage)
    assert answer(source) == 42


@needs_compiler
def test_without_a_private_folder_nothing_is_kept(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True, mode=0o700)
    planted = cache / "planted.so"
    cache.chmod(0o777)
    assert answer(source) == 42
    assert not planted.exists()
    assert list(cache.iterdir()) == []
    assert "others may write" in describe_library_cache()
    cache.rmdir()
    cache.symlink_to(tmp_path / "nowhere")
    assert answer(source) == 42
    assert "CASCADE_LLM_CACHE" in describe_library_cache()


def test_a_folder_below_one_that_all_may_write_is_not_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("CASCADE_LLM_CACHE", str(shared / "cache"))
    with pytest.raises(BackendError, match=r"others may write to .*shared"):
        private_folder("native")
    shared.chmod(0o1777)
    assert private_folder("native").is_dir()


def test_a_folder_of_another_user_is_not_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private_folder("native")
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(BackendError, match="others may write"):
        private_folder("native")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (b"#!/bin/sh\nprintf 'caf\\351: no'; exit 1\n", "caf\ufffd: no"),
        (b"\x00\x01\x02\x03 a program of another machine", "did not compile"),
        (b"#!/no/such/interpreter\n", "did not compile"),
        (b"#!/bin/sh\nexit 0\n", "wrote no library"),
        (b'#!/bin/sh\nwhile [ "$1" != -o ]; do shift || exit 0; done\necho text > "$2"\n', "did not load"),
    ],
    ids=["output that is no UTF-8", "another format", "no interpreter", "no output", "no library"],
)
def test_a_compiler_that_fails_is_a_reason(
    script: bytes, reason: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_that(monkeypatch, tmp_path / "bin", script)
    with pytest.raises(BackendError, match=reason):
        answer(source)


@needs_compiler
def test_a_library_without_its_functions_is_a_reason(source: Path) -> None:
    with pytest.raises(BackendError, match="without question"):
        compile_library(source, ("-DANSWER=1",), ("answer", "question"))


def hold_to(monkeypatch: pytest.MonkeyPatch, patience: Patience) -> None:
    monkeypatch.setattr(c_compiler, "ASKED_ITS_VERSION", patience)
    monkeypatch.setattr(c_compiler, "COMPILING", patience)


@pytest.mark.parametrize("argument", ["--version", "-o"])
def test_a_compiler_that_hangs_is_ended_with_what_it_started(
    argument: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'#!/bin/sh\ncase "$*" in *{argument}*) sleep 86413 & sleep 86413;; esac\n'
    compiler_that(monkeypatch, tmp_path / "bin", script.encode())
    hold_to(monkeypatch, Patience(idle_s=0.5, computing_s=60))
    for _ in range(3):
        with pytest.raises(BackendError, match="was ended after 0 s without computing"):
            compile_library(source, ("-DANSWER=1",), ("answer",))
    time.sleep(0.1)
    assert programs_named("sleep 86413") == 0


COMPUTES = "i=0; while [ $i -lt {loops} ]; do i=$((i+1)); done\n"


@needs_compiler
@needs_proc
def test_a_compiler_that_computes_may_take_longer_than_it_may_wait(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_that(
        monkeypatch, tmp_path / "bin", f'#!/bin/sh\n{COMPUTES.format(loops=400_000)}exec {GCC} "$@"\n'.encode()
    )
    hold_to(monkeypatch, Patience(idle_s=0.2, computing_s=60))
    assert answer(source) == 42


@needs_proc
def test_a_compiler_that_computes_without_an_end_is_ended(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler_that(monkeypatch, tmp_path / "bin", f"#!/bin/sh\n{COMPUTES.format(loops=10**12)}".encode())
    hold_to(monkeypatch, Patience(idle_s=1.0, computing_s=0.5))
    with pytest.raises(BackendError, match="s of computing"):
        answer(source)


@needs_compiler
def test_a_temporary_folder_that_cannot_be_written_is_a_reason(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert answer(source) == 42  # the cache's folder serves
    monkeypatch.setenv("CASCADE_LLM_CACHE", "/dev/null/cache")
    with pytest.raises(BackendError, match="did not compile"):
        answer(source)


@needs_compiler
def test_many_processes_at_once_build_it_once(
    source: Path, cache: Path, tmp_path: Path, repo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f'#!/bin/sh\ncase "$*" in *-o*) echo ran >> {tmp_path}/runs; sleep 0.5;; esac\nexec {GCC} "$@"\n'
    compiler_that(monkeypatch, tmp_path / "bin", script.encode())
    code = (
        "from pathlib import Path; from cascade_llm.device.c_compiler import compile_library; "
        f"print(compile_library(Path({str(source)!r}), ('-DANSWER=42',), ('answer',)).answer())"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=repo_root, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate()[0] for process in running] == ["42\n"] * 4
    assert [path.suffix for path in cache.iterdir()] == [".so"]
    assert (tmp_path / "runs").read_text().split() == ["ran"]


@needs_compiler
def test_whoever_waited_for_one_that_died_builds_it(source: Path, cache: Path) -> None:
    """The lock of a process that was killed is no longer held, its file stays."""
    assert answer(source) == 42
    (kept,) = cache.iterdir()
    kept.unlink()
    (cache / f"{kept.stem.rpartition('-')[0]}.lock").touch()
    assert answer(source) == 42
    assert [path.suffix for path in cache.iterdir()] == [".so"]
