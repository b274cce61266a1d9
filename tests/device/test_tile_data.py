"""Who may use tile registers once they are asked for: threads that were there before, and children of a fork."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cascade_llm.device.c_compiler import find_compiler
from cascade_llm.device.cpu_levels import LEVELS, reason_against

AMX = LEVELS["x86_64"][-1]
pytestmark = [
    pytest.mark.skipif(find_compiler() is None, reason="no C compiler"),
    pytest.mark.skipif(reason_against(AMX) is not None, reason=str(reason_against(AMX))),
]

TILES = """
import ctypes, os, sys, warnings
from pathlib import Path
from cascade_llm.device.c_compiler import compile_library
from cascade_llm.device.cpu_levels import LEVELS
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import PARALLEL
from cascade_llm.device.tile_data import reason_against_tiles
warnings.simplefilter("ignore")
os.environ["CASCADE_LLM_LEVEL"] = "avx2"
loop = native_functions(PARALLEL)["cascade_parallel_for"]
class Check(ctypes.Structure):
    _fields_ = (("inside", ctypes.c_int), ("together", ctypes.c_int), ("sums", ctypes.c_int32 * 8))
def sums():
    check = Check(together=3)
    part = ctypes.cast(tiles.tile_part, ctypes.c_void_p)
    loop(part, ctypes.byref(check), ctypes.c_long(3), ctypes.c_int(3))
    return list(check.sums)[:3]
PART = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long)
loop(PART(lambda task, index: None), None, ctypes.c_long(9), ctypes.c_int(3))
tiles = compile_library(Path({source!r}), LEVELS["x86_64"][-1].options, ("tile_part",))
assert reason_against_tiles() is None
print(sums())
child = os.fork()
if not child:
    print(sums(), flush=True)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_threads_of_before_and_children_have_tiles_too(run_python: Callable[[str], str]) -> None:
    source = str(Path(__file__).with_name("tile_check.c"))
    printed = run_python(TILES.format(source=source)).splitlines()
    assert sorted(printed) == ["[128, 256, 384]"] * 2
