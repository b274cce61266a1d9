"""The peak of this process's memory, which can be forgotten."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cascade_llm.bench.own_memory import CLEAR

CODE = """
import mmap
from cascade_llm.bench.own_memory import forget_peak, peak_bytes
def hold(num_bytes):
    with mmap.mmap(-1, num_bytes) as memory:
        for place in range(0, num_bytes, mmap.PAGESIZE): memory[place] = 1
before = peak_bytes()
hold(200 << 20)
held = peak_bytes()
assert held - before > 190 << 20, (before, held)
forget_peak()
assert held - peak_bytes() > 190 << 20
hold(50 << 20)
assert 45 << 20 < peak_bytes() - before < 100 << 20
"""


@pytest.mark.skipif(not CLEAR.exists(), reason="the system is not Linux")
def test_what_was_held_before_is_forgotten(run_python: Callable[[str], str]) -> None:
    run_python(CODE)
