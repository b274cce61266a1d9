"""Native code in tests: a compiler is enough for it, so only a machine without one may leave a test out.

Nothing here compiles while tests are collected: each worker would, and all would wait for it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cascade_llm.device.c_compiler import CACHE, find_compiler
from cascade_llm.device.cpu_levels import LEVELS, architecture
from cascade_llm.device.user_cache import private_folder

HAS_COMPILER = find_compiler() is not None and architecture() in LEVELS
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler here")


def expect_native(*reasons: str | None) -> None:
    """Fail where native code does not serve though there is a compiler, with the first reason that it has for that."""
    if not HAS_COMPILER:
        pytest.skip("no C compiler here")
    for reason in reasons:
        if reason is not None:
            pytest.fail(f"there is a compiler, but native code does not serve: {reason}")


def cache_without_measurements(folder: Path) -> str:
    """For CASCADE_LLM_CACHE: `folder`, with what is compiled for all tests and nothing that one has measured."""
    folder.mkdir(exist_ok=True)
    (folder / CACHE).symlink_to(private_folder(CACHE))
    return str(folder)
