"""A way to run `python -m benchmarks` in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks.__main__ import benchmarks
from tests.bench.conftest import *  # noqa: F403  # its fixtures
from tests.cli.conftest import Run, tiny_folder

__all__ = ["Run", "run", "tiny_folder"]


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a command line; the result has `exit_code`, `stdout` and `stderr`."""

    def run(*args: str | Path) -> Result:
        return CliRunner().invoke(benchmarks, list(map(str, args)))

    return run
