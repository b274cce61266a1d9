"""What every test shares: no network, no deadlines, and a way to run code in an interpreter of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from cascade_llm.device.user_cache import private_folder
from cascade_llm.errors import BackendError

# before any test imports transformers or huggingface_hub
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# a shared machine may stall any example, so none has a deadline; CI draws the same examples each time
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


CACHE = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()
UNUSED_S = 14 * 86400.0
"""After that long, compiled code that no test has asked for is of a source that is gone."""


def pytest_configure(config: pytest.Config) -> None:
    """One cache for a run, which its workers inherit: what the user has measured changes no test, nor the other way
    round, and what one worker has compiled serves the others, and later runs."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        config.stash[CACHE] = tempfile.TemporaryDirectory(prefix="cascade_llm_tests_")
        os.environ["CASCADE_LLM_CACHE"] = config.stash[CACHE].name
        if getattr(config, "cache", None) is not None:
            keep_compiled(config.cache.mkdir("compiled"), Path(config.stash[CACHE].name) / "native")


def keep_compiled(kept: Path, folder: Path) -> None:
    """Make `folder` lead to `kept`, unless others may write there: a library's name says what it was built from."""
    kept.chmod(0o700)
    for library in kept.glob("*.so"):
        if time.time() - library.stat().st_atime > UNUSED_S:
            library.unlink(missing_ok=True)
    folder.symlink_to(kept.absolute())
    try:
        private_folder(folder.name)
    except BackendError:
        folder.unlink()


def pytest_unconfigure(config: pytest.Config) -> None:
    """The cache goes with the run."""
    if CACHE in config.stash:
        config.stash[CACHE].cleanup()


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell starts what runs in the background with SIGINT ignored; processes that tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The folder that holds pyproject.toml."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def run_python(repo_root: Path) -> Callable[[str], str]:
    """Run code in a fresh interpreter and return what it printed; the test fails where the code does."""

    def run(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
