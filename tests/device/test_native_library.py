"""Where native code comes from: the wheel's library, this machine's compiler, or nowhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cascade_llm.device import native_build, native_library
from cascade_llm.device.c_compiler import find_compiler
from cascade_llm.device.cpu_levels import LEVEL_VARIABLE, LEVELS, architecture, levels_to_try
from cascade_llm.device.native_build import build_libraries, library_name
from cascade_llm.device.native_library import describe_native_code, native_functions
from cascade_llm.device.native_units import BLOCKED, PARALLEL, SAMPLER, attention_unit, ops_unit, units_of_wheel
from cascade_llm.errors import BackendError
from tests.native_code import needs_compiler

SAMPLER_ALONE = """
import os
from pathlib import Path
from cascade_llm.device import native_library
from cascade_llm.device.native_units import SAMPLER, ops_unit
native_library.WHEEL_FOLDER = Path({folder!r})
print(native_library.native_functions(SAMPLER)["scratch_len"](256))
try:
    native_library.native_functions(ops_unit("float32"))
except Exception as error:
    print(type(error).__name__, error)
print(native_library.describe_native_code())
"""


@pytest.fixture
def wheel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As a wheel's, for the lowest level alone, and with two units."""
    monkeypatch.setattr(native_build, "LEVELS", {architecture(): LEVELS[architecture()][:1]})
    monkeypatch.setattr(native_build, "units_of_wheel", lambda: iter((PARALLEL, SAMPLER)))
    compiler = find_compiler()
    assert compiler is not None
    (library,) = build_libraries([compiler], architecture(), tmp_path / "libraries")
    assert library.name == library_name(architecture(), LEVELS[architecture()][0])
    monkeypatch.undo()
    return library.parent


@needs_compiler
def test_without_a_compiler_the_wheels_library_serves(
    wheel_folder: Path, run_python: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    higher = [level.name for level in levels_to_try()[:-1]]
    monkeypatch.setenv("PATH", str(tmp_path))
    served, refused, told = run_python(SAMPLER_ALONE.format(folder=str(wheel_folder))).splitlines()
    assert int(served) > 0
    assert refused.startswith("BackendError native code needs a C compiler")
    assert "'level': 'baseline', 'source': 'the installed package'" in told
    assert all(f"{name}: native code needs a C compiler" in told for name in higher)


@needs_compiler
def test_what_the_wheel_does_not_hold_is_compiled(wheel_folder: Path, run_python: Callable[[str], str]) -> None:
    code = "import os; os.environ['CASCADE_LLM_LEVEL'] = 'baseline'\n" + SAMPLER_ALONE.format(folder=str(wheel_folder))
    served, told = run_python(code).splitlines()
    assert int(served) > 0
    assert "'source': 'the installed package'" in told


def test_with_neither_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native_library, "WHEEL_FOLDER", tmp_path)
    with pytest.raises(BackendError, match="needs a C compiler, and none of gcc, clang, cc was found"):
        native_functions(SAMPLER)
    told = describe_native_code()
    assert (told["level"], told["source"]) == (None, None)
    assert "needs a C compiler" in str(told["reason"])


@needs_compiler
def test_a_unit_needs_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEVEL_VARIABLE, "baseline")
    assert describe_native_code()["level"] == "baseline"
    with pytest.raises(BackendError, match="for processors with avx512_bf16, and baseline serves"):
        native_functions(BLOCKED)


def test_names_in_one_library_are_unique() -> None:
    names = [name for unit in units_of_wheel() for name in unit.exported]
    assert len(set(names)) == len(names)
    assert attention_unit("float32", "float32", 64) in list(units_of_wheel())
    assert ops_unit("bfloat16").exported[0] == "add_rms_norm_bfloat16"


def test_the_build_of_a_wheel_needs_the_standard_library_alone(run_python: Callable[[str], str]) -> None:
    code = """
import sys
before = set(sys.modules)
import cascade_llm.device.native_build
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    assert set(run_python(code).split()) - set(sys.stdlib_module_names) == {"cascade_llm"}
