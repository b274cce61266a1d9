"""The pool of threads, by a small C program's loops: in fresh processes, because a process has one pool."""

from __future__ import annotations

from collections.abc import Callable

from tests.native_code import needs_compiler

pytestmark = needs_compiler

LOOP = """
import ctypes, os, threading
from cascade_llm.device.native_library import native_functions
from cascade_llm.device.native_units import PARALLEL
PART = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_long)
loop = native_functions(PARALLEL)["cascade_parallel_for"]
loop.declare(PART, ctypes.c_void_p, ctypes.c_long, ctypes.c_int)
def run(count, threads, also=lambda index: None):
    seen, by = [], set()
    def part(task, index):
        seen.append(index); by.add(threading.get_native_id()); also(index)
    loop(PART(part), None, count, threads)
    assert sorted(seen) == list(range(count)), (count, threads, sorted(seen))
    return by
"""


def test_every_index_is_done_once(run_python: Callable[[str], str]) -> None:
    code = "for threads in (2, 3, 9):\n    for count in (2, 3, 7, 100) * 30: assert len(run(count, threads)) <= threads"
    run_python(LOOP + code)


def test_workers_help_after_they_have_slept(run_python: Callable[[str], str]) -> None:
    """While one thread waits in its part, the others do the rest."""
    code = """
import time
for pause_s in (0, 0.05):
    time.sleep(pause_s)
    others = threading.Event()
    def also(index):
        if index == 0: assert others.wait(900), "nobody came"
        if index == 49: others.set()
    assert len(run(50, 2, also)) == 2
"""
    run_python(LOOP + code)


def test_a_child_of_a_fork_has_workers_of_its_own(run_python: Callable[[str], str]) -> None:
    code = """
import sys, warnings
warnings.simplefilter("ignore")
run(50, 4)
child = os.fork()
if not child:
    for _ in range(20): run(50, 4)
    os._exit(7)
run(50, 4)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    run_python(LOOP + code)


def test_loops_inside_a_part_and_beside_each_other_are_done(run_python: Callable[[str], str]) -> None:
    code = """
run(6, 3, lambda index: run(4, 3))
threads = [threading.Thread(target=lambda: [run(20, 3) for _ in range(50)]) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    run_python(LOOP + code)


def test_no_openmp_runtime_comes_with_it(run_python: Callable[[str], str]) -> None:
    code = """
run(50, 2)
names = {line.split("/")[-1] for line in open("/proc/self/maps")} if os.path.exists("/proc/self/maps") else set()
print(sorted(name for name in names if name.startswith(("libgomp", "libomp", "libiomp"))))
"""
    assert run_python(LOOP + code).strip() == "[]"
