"""The packed products of every level of processor, those of aarch64 under an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cascade_llm.device.cpu_levels import LEVELS, CpuLevel, architecture, reason_against
from cascade_llm.device.native_units import (
    PACKED_FLOATS,
    PACKED_FRACTIONS,
    PACKED_INTEGERS,
    PACKED_LAYOUT,
    PACKED_PRODUCT,
    PARALLEL,
    packed_tiles_unit,
)

pytestmark = pytest.mark.slow

CHECK = Path(__file__).with_name("packed_check.c")
COMPILERS = {"x86_64": "gcc", "aarch64": "aarch64-linux-gnu-gcc"}
CASES = [(name, level) for name, levels in LEVELS.items() for level in levels]

UNITS = (
    PARALLEL,
    PACKED_LAYOUT,
    PACKED_PRODUCT,
    *(packed_tiles_unit(code, is_exact) for code in PACKED_INTEGERS for is_exact in (False, True)),
    *(packed_tiles_unit(code, is_exact=True) for code in (*PACKED_FRACTIONS, *PACKED_FLOATS)),
)


@pytest.mark.parametrize(("name", "level"), CASES, ids=[f"{name}-{level.name}" for name, level in CASES])
def test_every_kind_of_code_is_multiplied_rightly(name: str, level: CpuLevel, tmp_path: Path) -> None:
    is_own = name == architecture()
    compiler, emulator = shutil.which("gcc" if is_own else COMPILERS[name]), shutil.which(f"qemu-{name}")
    if compiler is None or (not is_own and emulator is None):
        pytest.skip(f"no compiler or emulator for {name}")
    if is_own and (reason := reason_against(level)):
        pytest.skip(reason)
    program = tmp_path / "check"
    folders = (f"-I{PARALLEL.path.parent}", f"-I{PACKED_PRODUCT.path.parent}")
    command = [compiler, "-O2", *level.options, *([] if is_own else ["-static"]), *folders]
    for unit in UNITS:
        target = tmp_path / f"{unit.path.stem}{unit.suffix}.o"
        subprocess.run([*command, *unit.options, "-c", unit.path, "-o", target], check=True)
    subprocess.run([*command, CHECK, *tmp_path.glob("*.o"), "-o", program, "-lm", "-lpthread"], check=True)
    ran = subprocess.run([*([] if is_own else [emulator]), program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")
