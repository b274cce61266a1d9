"""The native code of aarch64: what calls it here passes its tests with the code of each level, run by an emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cascade_llm.device.cpu_levels import LEVELS
from tests.emulated_level import COMPILERS

pytestmark = pytest.mark.slow

FILES = (
    "layers/test_fused_ops.py",
    "attention/test_native_backend.py",
    "sampling/test_native_sampler.py",
    "weights/test_stack.py",
    "weights/test_super_blocks.py",
)
OF_THIS_MACHINE = "serves_the_cpu or without_a_compiler or every_level or soft_cap"
"""Tests of what is found here; and some that only repeat others here."""


@pytest.mark.parametrize("level", [level.name for level in LEVELS["aarch64"]])
def test_kernels_pass_their_tests_in_an_emulator(level: str, repo_root: Path) -> None:
    for tool in (COMPILERS["aarch64"], "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulated_level", "--emulate", f"aarch64-{level}"]
    files = [str(repo_root / "tests" / name) for name in FILES]
    done = subprocess.run(
        [*command, "-k", f"not ({OF_THIS_MACHINE})", *files],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(repo_root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
